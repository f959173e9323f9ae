"""What all models of a process share: the memory that weights lie in, and a budget for it."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from modelcache.buffers import SlabPool

__all__ = ["budget", "pool", "reserve_memory", "set_memory_budget"]


class _Cache(Protocol):
    last_used: float

    def held_bytes(self) -> int: ...
    def shed(self, nbytes: int) -> int: ...


class Budget:
    """How many bytes of weights all models together may hold.

    What a forward pass needs now is always loaded: first, layers that no pass uses are dropped, of whichever model
    waited longest for its turn; only then the budget is exceeded. Nothing is read ahead beyond it.
    """

    def __init__(self) -> None:
        self.nbytes: int | None = None
        self._lock = threading.Lock()
        self._caches: list[weakref.ref[_Cache]] = []

    def join(self, cache: _Cache) -> None:
        """Counts a model's components from now on, as long as it lives."""
        with self._lock:
            self._caches.append(weakref.ref(cache, self._caches.remove))

    def room(self) -> float:
        """Bytes that may still be read ahead; negative when the budget is exceeded."""
        if self.nbytes is None:
            return float("inf")
        return self.nbytes - sum(cache.held_bytes() for cache in self._members())

    def make_room(self, nbytes: int, asker: _Cache) -> None:
        """Drops layers that nobody uses, other models' first, until ``nbytes`` fit or there are none."""
        missing = nbytes - self.room()
        others = [cache for cache in self._members() if cache is not asker]
        for cache in [*sorted(others, key=lambda cache: cache.last_used), asker]:
            if missing <= 0:
                return
            missing -= cache.shed(int(missing))

    def _members(self) -> list[_Cache]:
        with self._lock:
            found = [reference() for reference in self._caches]
        return [cache for cache in found if cache is not None]


pool = SlabPool()
budget = Budget()


def set_memory_budget(nbytes: int | None) -> None:
    """Limits the memory for weights of all streamed models of this process together.

    Args:
        nbytes: None: no limit but each model's own cache_size and cache_bytes.
    """
    if nbytes is not None and nbytes < 1:
        raise ValueError(f"A memory budget must be at least 1 byte, or None for no limit; it is {nbytes}.")
    budget.nbytes = nbytes


def reserve_memory(nbytes: int, *, slab_bytes: int) -> None:
    """Faults memory in ahead of time, so that the first pass of a model does not pay for it.

    Args:
        nbytes: how much, altogether.
        slab_bytes: of one component (a layer, the embeddings).
    """
    pool.keep_bytes = max(pool.keep_bytes, nbytes)
    pool.reserve(nbytes, slab_bytes)
