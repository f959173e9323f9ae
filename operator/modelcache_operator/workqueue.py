"""A queue of keys with client-go's promises: no key runs twice at once, no wake-up is lost, failures back off."""

import asyncio
import random
from typing import Generic, TypeVar

K = TypeVar("K")


class WorkQueue(Generic[K]):
    """Keys that wait to be reconciled.

    All methods belong to one event loop. A key added while it is being worked on runs once more afterwards; one added
    many times while it waits runs once.

    Attributes:
        base: Seconds before the first retry of a failing key; doubles with each failure.
        cap: The longest back-off in seconds.
    """

    def __init__(self, base: float = 0.5, cap: float = 60.0) -> None:
        self.base = base
        self.cap = cap
        self._ready: dict[K, None] = {}
        self._active: dict[K, asyncio.Event] = {}
        self._dirty: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._signal = asyncio.Event()

    def __len__(self) -> int:
        """How many keys are ready to run now (metrics)."""
        return len(self._ready)

    def is_active(self, key: K) -> bool:
        """Whether a worker has the key."""
        return key in self._active

    def again(self) -> None:
        """Run once more, when it is done, whatever a worker has now."""
        self._dirty.update(self._active)

    async def until_done(self, key: K) -> None:
        """Wait until no worker has the key."""
        if (working := self._active.get(key)) is not None:
            await working.wait()

    def add(self, key: K) -> None:
        """Run the key as soon as a worker is free."""
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        if key in self._active:
            self._dirty.add(key)
        else:
            self._ready[key] = None
            self._signal.set()

    def add_after(self, key: K, delay: float) -> None:
        """Run the key in ``delay`` seconds, or earlier if something else asks for it."""
        if key in self._ready:  # it runs later than now anyway, and sees what there is then
            return
        loop = asyncio.get_running_loop()
        if (timer := self._timers.get(key)) is not None:
            if timer.when() <= loop.time() + delay:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(delay, self._fire, key)

    def retry(self, key: K, *, at_least: float = 0.0) -> float:
        """Run a key that failed again, later each time.

        Args:
            key: The key that failed.
            at_least: Seconds that the other side asked us to wait (Retry-After).

        Returns:
            The seconds until the retry.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        backoff = min(self.cap, self.base * 2 ** min(failures - 1, 30)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
        delay: float = max(backoff, at_least)
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """Start the back-off anew: the key succeeded."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Wait for a key and take it; the caller owes a `done`."""
        while not self._ready:
            self._signal.clear()
            await self._signal.wait()
        key = next(iter(self._ready))
        del self._ready[key]
        self._active[key] = asyncio.Event()
        return key

    def done(self, key: K) -> None:
        """Give a key back that `get` handed out."""
        self._active.pop(key).set()
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)

    def close(self) -> None:
        """Cancel all timers, so that nothing fires after the loop's owner has gone."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)
