"""A model's components in memory: loads what a call needs, binds it to the modules, and takes it away again."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache.errors import ModelCacheError, Unavailable
from modelcache.loader import Load
from modelcache.process import budget
from modelcache.volume_lane import VolumeSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from modelcache.architecture import Component
    from modelcache.layers import LayerPolicy
    from modelcache.loader import Loader
    from modelcache.reader import Source

__all__ = ["CacheStatistics", "ComponentCache"]


@dataclass
class CacheStatistics:
    """What happened to layers so far.

    Attributes:
        hits: layers that were here from an earlier use.
        prefetched: layers whose load had been started ahead of their use.
        misses: layers whose load started only when they were needed.
        waited_seconds: for layers that were not there yet.
        wire_bytes: received for them.
    """

    hits: int = 0
    prefetched: int = 0
    misses: int = 0
    waited_seconds: float = 0.0
    wire_bytes: int = 0


class ComponentCache:
    """Loads and evicts the components of one model. All methods may be called from any thread.

    Args:
        blocks: loaded when called.
        resident: loaded once.
        policy: what stays; guarded by this object's lock.
        loader: reads in the background.
        source: where bytes come from.
        timeout: seconds that one component, or 64 MiB of a larger one, may take.

    Attributes:
        last_used: when a pass last asked for a block, by the monotonic clock.
    """

    def __init__(
        self,
        blocks: tuple[Component, ...],
        resident: tuple[Component, ...],
        policy: LayerPolicy,
        loader: Loader,
        source: Source,
        timeout: float,
    ) -> None:
        self.blocks = {component.name: component for component in blocks}
        self.resident = {component.name: component for component in resident}
        self.policy = policy
        self.statistics = CacheStatistics()
        self.timeout = timeout
        self.last_used = 0.0
        self._loader = loader
        self._source = source
        self._lock = threading.RLock()
        self._loads: dict[str, Load] = {}
        self._bound: set[str] = set()
        self._ahead = policy.ahead
        self._here = threading.local()
        budget.join(self)

    def start(self, begun: Iterable[Load] = ()) -> None:
        """Starts to load the resident components and the first blocks.

        Args:
            begun: loads that were started when the components were only guessed from the checkpoint's names; those that
                turn out to be a component's are used, the others dropped.
        """
        with self._lock:
            by_places = {frozenset(load.layouts[0].offsets): load for load in begun}
            for name, component in {**self.resident, **self.blocks}.items():
                load = by_places.get(frozenset(component.layout.offsets))
                if load is not None and load.layouts == (component.layout, component.scratch):
                    load.adopt(component)
                    self._loads[name] = load
                    if name in self.blocks:
                        self.policy.ahead_of_use[name] = None
            for load in begun:
                if load.component is None:
                    self._loader.drop(load)
            for name in self.resident.keys() - self._loads.keys():
                self._start(name, urgent=True)
            self._prefetch()

    @contextmanager
    def reading_ahead(self, count: int) -> Iterator[None]:
        """Has what the calling thread runs meanwhile read ``count`` blocks ahead."""
        self._here.ahead = count
        try:
            yield
        finally:
            del self._here.ahead

    def acquire(self, name: str) -> None:
        """Has a block's parameters in their places, and keeps them there until ``release``."""
        self.last_used = time.monotonic()
        if budget.nbytes is not None and name not in self._loads:
            budget.make_room(self.blocks[name].nbytes, self)
        with self._lock:
            self.policy.ahead = getattr(self._here, "ahead", self._ahead)
            access = self.policy.acquire(name, threading.get_ident())
            self.statistics.hits += access.hit
            self.statistics.prefetched += access.prefetched
            if not access.hit and not access.prefetched:
                self.statistics.misses += 1
            self._evict()
            load = self._loads.get(name) or self._start(name, urgent=True)
            self._prefetch()
        try:
            self._finish(name, load)
        except BaseException:
            self.release(name)
            raise

    def release(self, name: str) -> None:
        """Ends one use of a block."""
        with self._lock:
            self.policy.release(name)
            self._evict()

    def wait_for_resident(self) -> None:
        """Has the resident components' parameters in their places."""
        if len(self._bound.intersection(self.resident)) == len(self.resident):
            return
        for name in self.resident:
            with self._lock:
                load = self._loads.get(name) or self._start(name, urgent=True)
            self._finish(name, load)

    def load_ahead(self, names: list[str]) -> None:
        """Loads blocks ahead of their use and waits for them."""
        for name in names:
            self.acquire(name)
            self.release(name)

    def in_use(self, name: str) -> bool:
        """Whether somebody computes with a block now."""
        with self._lock:
            return self.policy.in_use(name)

    def prefetch_named(self, names: list[str]) -> None:
        """Starts to load these blocks, as far as there is room ahead of use."""
        with self._lock:
            for name in self.policy.prefetch_named(names):
                if name not in self._loads:
                    self._start(name, urgent=False)

    def resize(self, *, max_layers: int | None, max_bytes: int | None) -> None:
        """Changes the limits; what is over them goes at once."""
        with self._lock:
            self.policy.max_layers, self.policy.max_bytes = max_layers, max_bytes
            self._evict()
            self._prefetch()

    def clear(self) -> None:
        """Drops every block that nobody computes with."""
        with self._lock:
            for name in [*self.policy.used, *self.policy.ahead_of_use]:
                if not self.policy.in_use(name):
                    self.policy.forget(name)
                    self._drop(name)

    def cancel(self) -> None:
        """Breaks off what is being read and ends the threads; nothing can be loaded afterwards."""
        self._loader.close()

    def close(self) -> None:
        """Cancels, and puts every parameter back on meta."""
        self.cancel()
        with self._lock:
            self._ahead = self.policy.ahead = 0  # Nothing would come, and yet be counted as on its way.
            for name in list(self._loads):
                self.policy.forget(name)
                self._drop(name)

    def keeps_all(self) -> bool:
        """Whether no block is ever evicted."""
        layers, nbytes = self.policy.max_layers, self.policy.max_bytes
        return (layers is None or layers >= len(self.blocks)) and (
            nbytes is None or nbytes >= sum(self.policy.sizes.values())
        )

    def held_bytes(self) -> int:
        """Memory of components that are here or on their way.

        Takes no lock: the budget asks for it while another model's is held, and that model may be asking likewise.
        """
        return sum(self._component(name).nbytes for name in list(self._loads))

    def contents(self) -> tuple[list[str], list[str]]:
        """Blocks that were used and are here, oldest use first, and those loaded, or being loaded, ahead of use."""
        with self._lock:
            return list(self.policy.used), list(self.policy.ahead_of_use)

    def resident_here(self) -> list[str]:
        """Resident components that are here or on their way."""
        with self._lock:
            return [name for name in self.resident if name in self._loads]

    def wire_bytes(self) -> int:
        """Received so far, for components that are here and for those that are gone."""
        with self._lock:
            return self.statistics.wire_bytes + sum(load.wire_bytes for load in self._loads.values())

    def _component(self, name: str) -> Component:
        return self.blocks.get(name) or self.resident[name]

    def _start(self, name: str, *, urgent: bool) -> Load:
        component = self._component(name)
        load = Load(name, (component.layout, component.scratch), self._source, self.timeout, component)
        self._loads[name] = load
        self._loader.submit(load, urgent=urgent)
        return load

    def shed(self, nbytes: int) -> int:
        """Drops idle blocks, those needed last first, until ``nbytes`` bytes are free; says how many are."""
        freed = 0
        with self._lock:
            for name in self.policy.farthest_first():
                if freed >= nbytes:
                    break
                self.policy.forget(name)
                if name in self._loads:
                    freed += self._component(name).nbytes
                    self._drop(name)
        return freed

    def _prefetch(self) -> None:
        wanted, dropped = self.policy.prefetches(budget.room())
        for name in dropped:
            self._drop(name)
        for name in wanted:
            if name not in self._loads:
                self._start(name, urgent=False)

    def _evict(self) -> None:
        for name in self.policy.evictions():
            self._drop(name)

    def _drop(self, name: str) -> None:
        load = self._loads.pop(name, None)
        if load is None:
            return
        if name in self._bound:
            self._bound.discard(name)
            for binding in self._component(name).bindings:
                for place in binding.places:
                    place.put(binding.meta)
        if not load.done.is_set():
            self._loader.drop(load)
        self.statistics.wire_bytes += load.wire_bytes
        load.tensors = []
        if load.mapped and isinstance(self._source, VolumeSource):
            self._source.forget(load.stored())

    def _finish(self, name: str, load: Load) -> None:
        """Waits for a load and binds it; a prefetch that had failed before it was needed is tried once more."""
        if name in self._bound:
            return
        if not load.done.is_set() or load.error is not None:
            load = self._await(name, load)
        with self._lock:
            if name not in self._bound:
                for binding, tensor in zip(self._component(name).bindings, load.tensors, strict=True):
                    for place in binding.places:
                        place.put(tensor)
                self._bound.add(name)

    def _await(self, name: str, load: Load) -> Load:
        if load.done.is_set() and load.error is not None:
            with self._lock:
                current = self._loads.get(name)
                load = self._start(name, urgent=True) if current is load or current is None else current
        self._loader.hurry(load)
        waited = _wait(load, self.timeout)
        with self._lock:
            self.statistics.waited_seconds += waited
            if load.error is not None and self._loads.get(name) is load:
                del self._loads[name]
                self.policy.forget(name)
        if load.error is not None:
            raise _surfaced(load.error)
        return load


def _wait(load: Load, timeout: float) -> float:
    started = time.monotonic()
    if not load.done.wait(timeout + 5.0):
        raise Unavailable(f"{load.name} was not loaded within {timeout:g} s.")
    return time.monotonic() - started


def _surfaced(error: BaseException) -> BaseException:
    """The background thread's error, as a new one of its kind, so that each waiting thread has its own traceback."""
    if isinstance(error, ModelCacheError):
        copy: BaseException = error.__class__.__new__(error.__class__)
        copy.args = error.args
        copy.__dict__.update(error.__dict__)
        copy.__cause__ = error
        return copy
    return error
