"""Which layers stay, which go, which come next: decided here, on names and sizes alone.

A forward pass is a cyclic scan, on which an LRU never hits. Layers are therefore evicted by the order that was learned:
what is needed last goes first, so the first ``cache_size - 1`` layers stay and one slot rotates (Belady's rule). Layers
on their way, or here but not used yet, are counted apart: at most ``ahead`` of them on top of ``cache_size``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

__all__ = ["Access", "LayerPolicy"]


@dataclass(frozen=True, slots=True)
class Access:
    """What a layer was when it was asked for: exactly one is true, or none if it has to be loaded."""

    hit: bool = False
    prefetched: bool = False


@dataclass
class LayerPolicy:
    """The state of one model's layer cache. Not thread-safe: its owner holds a lock.

    Attributes:
        sizes: bytes of each layer, in the order in which the model is expected to call them.
        max_layers: how many used layers stay; None: no limit.
        max_bytes: how many bytes of used layers stay; None: no limit.
        ahead: how many layers may be loaded ahead, on top of the limits.
        used: layers that were used and are here, least recently used first.
        ahead_of_use: layers that are on their way or here, but were not used yet.
    """

    sizes: Mapping[str, int]
    max_layers: int | None = None
    max_bytes: int | None = None
    ahead: int = 2
    used: dict[str, None] = field(default_factory=dict)
    ahead_of_use: dict[str, None] = field(default_factory=dict)
    _users: dict[str, int] = field(default_factory=dict)
    _next: dict[str, str] = field(default_factory=dict)
    _last: dict[Hashable, str] = field(default_factory=dict)
    _latest: str | None = None

    def __post_init__(self) -> None:
        names = list(self.sizes)
        self._next = {name: names[(index + 1) % len(names)] for index, name in enumerate(names)}

    def acquire(self, name: str, caller: Hashable) -> Access:
        """Notes that ``caller`` (a thread) starts to use a layer; it is not evicted until it is released."""
        access = Access(hit=name in self.used, prefetched=name in self.ahead_of_use)
        last = self._last.get(caller)
        if last is not None and last != name:
            self._next[last] = name
        self._last[caller] = self._latest = name
        self.ahead_of_use.pop(name, None)
        self.used.pop(name, None)
        self.used[name] = None
        self._users[name] = self._users.get(name, 0) + 1
        return access

    def release(self, name: str) -> None:
        """Notes that one user of a layer is done with it."""
        left = self._users[name] - 1
        if left:
            self._users[name] = left
        else:
            del self._users[name]

    def forget(self, name: str) -> None:
        """Notes that a layer is not here any more (its load failed, or it was dropped)."""
        self.used.pop(name, None)
        self.ahead_of_use.pop(name, None)

    def in_use(self, name: str) -> bool:
        """Whether somebody computes with a layer now."""
        return name in self._users

    def evictions(self) -> list[str]:
        """Layers to drop now so that the limits hold, those needed last first; they are forgotten."""
        dropped: list[str] = []
        if not self._over():
            return dropped
        distance = self._distances()
        far = len(self.sizes) + 1
        # Most recently used last: of layers that are equally far, the older ones are dropped first.
        candidates = [name for name in self.used if name not in self._users]
        candidates.sort(key=lambda name: -distance.get(name, far))
        for name in candidates:
            if not self._over():
                break
            self.forget(name)
            dropped.append(name)
        return dropped

    def farthest_first(self) -> list[str]:
        """Layers that nobody computes with, those needed last first."""
        distance, far = self._distances(), len(self.sizes) + 1
        idle = [name for name in [*self.used, *self.ahead_of_use] if name not in self._users]
        return sorted(idle, key=lambda name: -distance.get(name, far))

    def prefetches(self, room: float = float("inf")) -> tuple[list[str], list[str]]:
        """What to load ahead now, and which useless prefetches to drop for it; both are noted as done.

        Args:
            room: bytes that may be loaded ahead at most, whatever this cache's own limits allow.
        """
        wanted: list[str] = []
        dropped: list[str] = []
        if len(self.used) + len(self.ahead_of_use) == len(self.sizes):
            return wanted, dropped
        upcoming = [name for name in self.upcoming() if name not in self.used]
        for name in upcoming:
            if name in self.ahead_of_use:
                continue
            if not self._has_room(name):
                nearer = set(upcoming[: upcoming.index(name) + 1])
                useless = next((each for each in self.ahead_of_use if each not in nearer), None)
                if useless is None:
                    break
                del self.ahead_of_use[useless]
                dropped.append(useless)
                if not self._has_room(name):
                    break
            room -= self.sizes[name]
            if room < 0:
                break
            self.ahead_of_use[name] = None
            wanted.append(name)
        return wanted, dropped

    def prefetch_named(self, names: list[str]) -> list[str]:
        """Of ``names``, what is not here and fits ahead of use; noted as on its way."""
        wanted = []
        for name in names:
            if name not in self.used and name not in self.ahead_of_use and self._has_room(name):
                self.ahead_of_use[name] = None
                wanted.append(name)
        return wanted

    def upcoming(self) -> Iterator[str]:
        """Layers in the order in which they are expected to be needed, from the next one on."""
        names = list(self.sizes)
        if not names:
            return
        name = names[0] if self._latest is None else self._next[self._latest]
        seen = set()
        while name not in seen:
            seen.add(name)
            yield name
            name = self._next[name]

    def _distances(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.upcoming())}

    def _over(self) -> bool:
        if len(self.used) <= 1:
            return len(self.used) > (1 if self.max_layers is None else max(self.max_layers, 0))
        if self.max_layers is not None and len(self.used) > self.max_layers:
            return True
        return self.max_bytes is not None and self._bytes(self.used) > self.max_bytes

    def _has_room(self, name: str) -> bool:
        if self.ahead <= 0:
            return False
        held = len(self.used) + len(self.ahead_of_use)
        if self.max_layers is not None and held >= self.max_layers + self.ahead:
            return False
        if self.max_bytes is None:
            return True
        room = self.max_bytes + self.ahead * max(self.sizes.values())
        return self._bytes(self.used) + self._bytes(self.ahead_of_use) + self.sizes[name] <= room

    def _bytes(self, names: dict[str, None]) -> int:
        return sum(self.sizes[name] for name in names)
