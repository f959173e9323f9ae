"""Which block leaves when a new one needs its place: a segmented LRU that a long scan cannot flush. Pure bookkeeping.

New blocks live in a small window. What leaves the window competes with the oldest block of the main part by how often
each was used lately (a count that ages); the loser is evicted. The main part is a segmented LRU: a second use moves a
block from probation to the protected segment. So one pass over a terabyte turns only the window over, and a cyclic
scan larger than the cache still hits on the part that stays, where a plain LRU would never hit.
(W-TinyLFU: Einziger, Friedman, Manes, https://arxiv.org/abs/1512.00727.)
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_PROTECTED_SHARE = 0.8  # of the main part
_MAX_COUNT = 15
_SAMPLE_PER_SLOT = 10  # uses per slot after which all counts are halved
_GHOSTS_PER_SLOT = 16  # remembered counts, also of blocks that left


@dataclass
class _Use:
    count: int
    counted_at: int


class EvictionPolicy(Generic[Key]):
    """Order of eviction for at most `capacity` keys. Not thread safe: its owner holds a lock."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError("capacity must be positive")
        self.capacity = capacity
        self.window_target = max(min(4, capacity // 2), capacity // 10)
        self._protected_target = int((capacity - self.window_target) * _PROTECTED_SHARE)
        self._window: OrderedDict[Key, None] = OrderedDict()
        self._probation: OrderedDict[Key, None] = OrderedDict()
        self._protected: OrderedDict[Key, None] = OrderedDict()
        self._uses: OrderedDict[Key, _Use] = OrderedDict()
        self._clock = 0
        self._last: Key | None = None
        self._counted = 0

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def admit(self, key: Key, *, used: bool = True) -> None:
        """Take a new key in; `used=False` for one that was loaded ahead and is still to be asked for."""
        self._window[key] = None
        if used:
            self._count(key)
        # While there is room, nothing competes: the window's overflow moves on unseen.
        while len(self._window) > self.window_target and len(self) < self.capacity:
            oldest, _ = self._window.popitem(last=False)
            self._probation[oldest] = None

    def touch(self, key: Key) -> None:
        """A key was used again."""
        fresh = self._count(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        elif not fresh:
            self._probation.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None
            while len(self._protected) > self._protected_target:
                demoted, _ = self._protected.popitem(last=False)
                self._probation[demoted] = None

    def remove(self, key: Key) -> None:
        """A key left without being chosen by `victim` (its load failed)."""
        for segment in (self._window, self._probation, self._protected):
            if key in segment:
                del segment[key]
                return
        raise KeyError(key)

    def retire(self, key: Key) -> None:
        """Forget how much a key was used, and let it be the next to leave: its snapshot is no longer the active one."""
        self._uses.pop(key, None)
        for segment in (self._window, self._probation, self._protected):
            if key in segment:
                del segment[key]
                self._probation[key] = None
                self._probation.move_to_end(key, last=False)
                return

    def victim(self, evictable: Callable[[Key], bool]) -> Key | None:
        """Remove and return the key to evict among those that may go; None if none may."""
        candidate = self._oldest(self._window, evictable)
        resident = self._oldest(self._probation, evictable)
        if resident is None:
            resident = self._oldest(self._protected, evictable)
        if candidate is None or (resident is not None and len(self._window) < self.window_target):
            loser = resident
        elif resident is None or self._frequency(candidate) <= self._frequency(resident):
            loser = candidate
        else:
            del self._window[candidate]
            self._probation[candidate] = None
            loser = resident
        if loser is not None:
            self.remove(loser)
        return loser

    @staticmethod
    def _oldest(segment: "OrderedDict[Key, None]", evictable: Callable[[Key], bool]) -> Key | None:
        return next((key for key in segment if evictable(key)), None)

    def _frequency(self, key: Key) -> int:
        use = self._uses.get(key)
        return use.count if use else 0

    def _count(self, key: Key) -> bool:
        """Count a use; a reader that takes a block in many small pieces counts once. True if it counted."""
        if key != self._last:
            self._clock += 1
            self._last = key
        use = self._uses.get(key)
        if use is None:
            self._uses[key] = _Use(1, self._clock)
            while len(self._uses) > self.capacity * _GHOSTS_PER_SLOT:
                self._uses.popitem(last=False)
        elif self._clock - use.counted_at > self.window_target:
            use.count = min(_MAX_COUNT, use.count + 1)
            use.counted_at = self._clock
            self._uses.move_to_end(key)
        else:
            return False
        self._counted += 1
        if self._counted >= self.capacity * _SAMPLE_PER_SLOT:
            self._age()
        return True

    def _age(self) -> None:
        self._counted //= 2
        for key, use in list(self._uses.items()):
            # What is here keeps a count of one: blocks that were seen once in a scan must not beat it.
            resident = key in self._protected or key in self._probation
            use.count = max(use.count // 2, 1 if resident else 0)
            if not use.count:
                del self._uses[key]
