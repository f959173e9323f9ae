"""Blocks in memory: an exact byte budget, one load per block however many ask, and pins while bytes are being sent."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from modelcache_server.arena import Arena
from modelcache_server.errors import Reason, RequestError
from modelcache_server.policy import EvictionPolicy


class BlockKey(NamedTuple):
    """A block by its content: the blob's SHA-256 (32 bytes) and the block's index in it."""

    sha256: bytes
    block: int


Load = Callable[[memoryview], None]
"""Fills the view it is given, entirely and with verified bytes, or raises."""


@dataclass(eq=False)
class _Entry:
    slot: int
    view: memoryview  # read-only, of the block's length
    pins: int = 1
    ready: bool = False
    error: Exception | None = None
    loaded: threading.Event = field(default_factory=threading.Event)


@dataclass
class CacheCounters:
    """Counts since the start; `hits` and `misses` are of reads, not of loads ahead."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failed_loads: int = 0
    loaded_ahead: int = 0


class Pin:
    """The right to read one block's bytes; its slot is not reused until `release` (or the end of `with`)."""

    __slots__ = ("_cache", "_entry", "view")

    def __init__(self, cache: "BlockCache", entry: _Entry) -> None:
        self._cache = cache
        self._entry = entry
        self.view = entry.view

    def release(self) -> None:
        """Give the block back; `view` must not be used afterwards."""
        self._cache._unpin(self._entry)  # noqa: SLF001 - one class in two parts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class BlockCache:
    """Maps blocks to slots of an arena. Thread safe; loads run outside the lock, in the thread that asked first."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._slot_freed = threading.Condition(self._lock)
        self._waiting_for_slot = 0
        self._entries: dict[BlockKey, _Entry] = {}
        self._free = list(range(arena.slots - 1, -1, -1))
        self._policy: EvictionPolicy[BlockKey] = EvictionPolicy(arena.slots)
        self.counters = CacheCounters()

    @property
    def capacity(self) -> int:
        """How many blocks fit."""
        return self._arena.slots

    @property
    def window(self) -> int:
        """How many blocks can be new at once without touching what is hot: the bound for reading ahead."""
        return self._policy.window_target

    def pin(self, key: BlockKey, length: int, load: Load, *, timeout: float) -> Pin:
        """Pin a block, loading it if need be.

        Args:
            key: which block.
            length: its size in bytes, at most a slot's.
            load: called in this thread if nobody else is loading the block.
            timeout: seconds to wait for a slot, or for another thread's load.

        Raises:
            RequestError: RESOURCE_EXHAUSTED when the time is over.
            Exception: what `load` raised, here or in the thread that loaded; nothing is kept of a failed load.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.ready:
                entry.pins += 1
                self.counters.hits += 1
                self._policy.touch(key)
                return Pin(self, entry)
        return self._pin_slowly(key, length, load, time.monotonic() + timeout)

    def load_ahead(self, key: BlockKey, length: int, load: Load, *, used: bool = False) -> bool:
        """Load a block that nobody asked for yet, if a slot can be had at once.

        Args:
            key: which block.
            length: its size in bytes.
            load: as for `pin`.
            used: count it as used once, so that it takes the place of blocks that were retired.

        Returns:
            Whether this call loaded it.

        Raises:
            Exception: what `load` raised.
        """
        with self._lock:
            if key in self._entries:
                return False
            entry = self._claim(key, length, used=used)
            if entry is None:
                return False
            self.counters.loaded_ahead += 1
        self._fill(key, entry, load)
        self._unpin(entry)
        return True

    def __contains__(self, key: BlockKey) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.ready

    def retire(self, keys: Iterable[BlockKey]) -> None:
        """Let these blocks be the first to leave."""
        with self._lock:
            for key in keys:
                self._policy.retire(key)

    def close(self) -> None:
        """Let go of the arena's memory. No block may be pinned any more."""
        with self._lock:
            for entry in self._entries.values():
                entry.view.release()
            self._entries.clear()

    def occupancy(self) -> tuple[int, int]:
        """(slots in use, slots pinned) now."""
        with self._lock:
            return len(self._entries), sum(1 for entry in self._entries.values() if entry.pins)

    def _pin_slowly(self, key: BlockKey, length: int, load: Load, deadline: float) -> Pin:
        with self._lock:
            mine = False
            entry = self._entries.get(key)
            while entry is None:
                entry = self._claim(key, length, used=True)
                if entry is not None:
                    mine = True
                    break
                self._wait_for_slot(deadline)
                entry = self._entries.get(key)
            self.counters.misses += 1
            if not mine:
                entry.pins += 1
                self._policy.touch(key)
        if mine:
            self._fill(key, entry, load)
            return Pin(self, entry)
        if not entry.loaded.wait(max(0.0, deadline - time.monotonic())):
            self._unpin(entry)
            raise RequestError(
                Reason.RESOURCE_EXHAUSTED, "The volume is slow: a block did not arrive in time. Retry.", retry_after=1.0
            )
        if entry.error is not None:
            raise entry.error
        return Pin(self, entry)

    def _wait_for_slot(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        self._waiting_for_slot += 1
        try:
            if left <= 0 or not self._slot_freed.wait(left):
                raise RequestError(
                    Reason.RESOURCE_EXHAUSTED,
                    "All of the server's cache is being sent to other readers. Retry, or give the server more cache.",
                    retry_after=1.0,
                )
        finally:
            self._waiting_for_slot -= 1

    def _claim(self, key: BlockKey, length: int, *, used: bool) -> _Entry | None:
        """Under the lock: an entry in a free or freed slot, pinned once; None when every slot is pinned."""
        if self._free:
            slot = self._free.pop()
        else:
            loser = self._policy.victim(lambda other: not self._entries[other].pins)
            if loser is None:
                return None
            slot = self._entries.pop(loser).slot
            self.counters.evictions += 1
        entry = _Entry(slot, self._arena.slot(slot)[:length].toreadonly())
        self._entries[key] = entry
        self._policy.admit(key, used=used)
        return entry

    def _fill(self, key: BlockKey, entry: _Entry, load: Load) -> None:
        try:
            load(self._arena.slot(entry.slot)[: len(entry.view)])
        except BaseException as error:
            with self._lock:
                # Whoever waits for this load sees the error and never the slot, which is free from here on.
                entry.error = error if isinstance(error, Exception) else RuntimeError("the load was interrupted")
                del self._entries[key]
                self._policy.remove(key)
                self._free.append(entry.slot)
                self.counters.failed_loads += 1
                self._slot_freed.notify()
            entry.loaded.set()
            raise
        with self._lock:
            entry.ready = True
        entry.loaded.set()

    def _unpin(self, entry: _Entry) -> None:
        with self._lock:
            entry.pins -= 1
            if not entry.pins and self._waiting_for_slot:
                self._slot_freed.notify()
