"""Loads components in background threads, the most urgent first, each at most once."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Any

import torch

from modelcache import openmp
from modelcache.deadline import Cancellation, Deadline
from modelcache.dtypes import as_parameter, torch_dtype, torch_shape
from modelcache.errors import Cancelled, Unavailable
from modelcache.reader import STEP_BYTES, read_run
from modelcache.sketch import Leaf, evaluate
from modelcache.volume_lane import VolumeSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.architecture import Component
    from modelcache.buffers import Lease, SlabPool
    from modelcache.plan import Layout, Run, Stored
    from modelcache.reader import Source

__all__ = ["Load", "Loader", "assemble", "default_workers", "tensor_at"]


def default_workers() -> int:
    """How many connections read at once: two, or one where there are two cores or fewer.

    A connection keeps a core busy with receiving and checking, which the computation needs too.
    """
    return 2 if len(os.sched_getaffinity(0)) > 2 else 1


class Load:
    """One component on its way.

    Args:
        name: of the component, for messages.
        layouts: what to read: what parameters look at, and what they are computed from.
        source: where to read it.
        seconds: until which it has to be there, once reading it has begun.
        component: what is loaded; None: not known yet (it is read ahead of the model's construction).

    Attributes:
        tensors: one for each binding, once it is done without an error and the component is known.
        error: why it failed.
        done: set when it has succeeded or failed.
    """

    def __init__(
        self,
        name: str,
        layouts: tuple[Layout, Layout],
        source: Source,
        seconds: float,
        component: Component | None = None,
    ) -> None:
        self.name = name
        self.layouts = layouts
        self.component = component
        self.tensors: list[torch.Tensor] = []
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.source = source
        self.seconds = seconds
        self.deadline: Deadline | None = None
        self.wire_bytes = 0
        self._runs = [(run, index) for index, layout in enumerate(layouts) for run in layout.runs]
        self.empty = not self._runs
        self.mapped = (
            isinstance(source, VolumeSource)
            and not layouts[0].fused
            and not layouts[1].runs
            and all(piece.tensor.can_be_mapped for run in layouts[0].runs for piece in run.pieces)
        )
        if self.mapped:
            self._runs = self._runs[:1]
        self._left = max(1, len(self._runs))
        self._lock = threading.Lock()
        self._leases: list[Lease | None] = []
        self._move: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None

    def next_run(self) -> tuple[Run, int] | None:
        """A run that nobody has started, with the index of its layout (0: main, 1: scratch); None: there is none."""
        return self._runs.pop(0) if self._runs else None

    def memory(self, index: int, pool: SlabPool, cancellation: Cancellation) -> memoryview:
        """The slab of the layout ``index``, taken when it is first needed."""
        with self._lock:
            if self.deadline is None:
                self.deadline = Deadline(self.seconds, cancellation)
            if not self._leases:
                self._leases = [pool.take(layout.nbytes) if layout.runs else None for layout in self.layouts]
            lease = self._leases[index]
        if lease is None:
            raise Cancelled("The layer is not needed any more.")
        return lease.view()

    def map(self) -> int:
        """Checks the tensors in the mapped files of a volume, and returns their bytes."""
        if not isinstance(self.source, VolumeSource):
            raise TypeError(f"{self.name} is not on a volume of this machine.")
        return self.source.check(self.stored())

    def stored(self) -> list[Stored]:
        """The checkpoint tensors that the parameters look at directly."""
        return list({piece.tensor.place: piece.tensor for run in self.layouts[0].runs for piece in run.pieces}.values())

    def finish_run(self, received: int) -> bool:
        """Counts one run as done; True when it was the last."""
        with self._lock:
            self.wire_bytes += received
            self._left -= 1
            return self._left == 0 and self.error is None

    def complete(self, move: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None) -> None:
        """Notes that all was received, and makes the tensors if it is known which."""
        with self._lock:
            self._move = move
            if self.component is not None:
                self._assemble(self.component)
            self.done.set()

    def adopt(self, component: Component) -> None:
        """Says what it is that was read ahead; the layout must be the component's."""
        with self._lock:
            self.component = component
            if self.done.is_set() and self.error is None:
                self._assemble(component)

    def _assemble(self, component: Component) -> None:
        main, scratch = self._leases or (None, None)
        if isinstance(self.source, VolumeSource) and self.mapped:
            source = self.source
            self.tensors = assemble(component, lambda stored: (source.map(stored.path), stored.offset), None, None)
        else:
            offsets = self.layouts[0].offsets
            self.tensors = assemble(
                component, lambda stored: (main.array if main else None, offsets.get(stored.place, 0)), main, scratch
            )
        self._leases = []
        if self._move is not None:
            self.tensors = self._move(self.tensors)

    def fail(self, error: BaseException) -> None:
        """Ends the load with an error, unless it has one."""
        with self._lock:
            self._runs = []
            if self.error is None:
                self.error = error
            self._leases = [None, None]
        self.done.set()


class Loader:
    """Background threads that read from one source; they end with ``close`` and hold no model alive.

    Args:
        pool: where memory comes from.
        workers: connections, and threads, that read at once.
        name: of the threads.
        step_bytes: how much is received before it is checked.
        move: takes a component's tensors to another device; None: they stay.
    """

    def __init__(
        self,
        pool: SlabPool,
        *,
        workers: int,
        name: str = "modelcache",
        step_bytes: int = STEP_BYTES,
        move: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    ) -> None:
        self.pool = pool
        self._move = move
        self._step_bytes = step_bytes
        self.cancellation = Cancellation()
        self._condition = threading.Condition()
        self._queue: list[tuple[int, int, Load]] = []
        self._count = itertools.count()
        self._name = name
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def submit(self, load: Load, *, urgent: bool = False) -> None:
        """Starts to load; urgent loads come before all others."""
        if self._is_elsewhere(load):
            return
        with self._condition:
            if self.cancellation.cancelled:
                load.fail(Cancelled("The model was cleaned up; create it anew to go on."))
                return
            self._queue.append((0 if urgent else 1, next(self._count), load))
            self._queue.sort(key=lambda item: item[:2])
            while len(self._threads) < self._workers:
                number = len(self._threads)
                thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify_all()

    def hurry(self, load: Load) -> None:
        """Moves a load that somebody waits for to the front."""
        if self._is_elsewhere(load):
            return
        with self._condition:
            self._queue = [(0 if each is load else rank, count, each) for rank, count, each in self._queue]
            self._queue.sort(key=lambda item: item[:2])

    def _is_elsewhere(self, load: Load) -> bool:
        """Fails a load in a process that was forked: threads stay behind, and connections are the other's."""
        if os.getpid() == self._process:
            return False
        if not load.done.is_set():
            load.fail(
                Unavailable(
                    f"{load.name} cannot be loaded here: the model was made in process {self._process}, from which "
                    "this one was forked. Create it in each process, after the fork."
                )
            )
        return True

    def drop(self, load: Load) -> None:
        """Takes a load out that nobody needs any more; what is under way of it is finished and thrown away."""
        with self._condition:
            self._queue = [item for item in self._queue if item[2] is not load]
        load.fail(Cancelled("The layer is not needed any more."))

    def close(self) -> None:
        """Breaks off what is under way and ends the threads."""
        self.cancellation.cancel()
        with self._condition:
            queued, self._queue = self._queue, []
            threads, self._threads = self._threads, []
            self._condition.notify_all()
        for _, _, load in queued:
            load.fail(Cancelled("The model was cleaned up; create it anew to go on."))
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while self._await_work():
            with openmp.counted():
                while (item := self._take()) is not None:
                    load, run, index = item
                    self._read(load, run, index)
                    del item, load  # A waiting thread must keep no component, and so no model, alive.

    def _await_work(self) -> bool:
        """Sleeps until there is something to read; False: never again."""
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self.cancellation.cancelled)
            return not self.cancellation.cancelled

    def _take(self) -> tuple[Load, Run | None, int] | None:
        with self._condition:
            while self._queue and not self.cancellation.cancelled:
                load = self._queue[0][2]
                run = load.next_run()
                if run is not None:
                    return load, *run
                self._queue.pop(0)
                if load.empty and not load.done.is_set():
                    return load, None, 0
            return None

    def _read(self, load: Load, run: Run | None, index: int) -> None:
        try:
            received = 0
            if load.mapped:
                received = load.map()
            elif run is not None:
                memory = load.memory(index, self.pool, self.cancellation)
                if load.deadline is not None:
                    received = read_run(load.source, run, memory, load.deadline, self._step_bytes)
            if load.finish_run(received):
                load.complete(self._move)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for this load
            load.fail(error)


def assemble(
    component: Component,
    locate: Callable[[Stored], tuple[Any, int]],
    main: Lease | None,
    scratch: Lease | None,
) -> list[torch.Tensor]:
    """Makes a component's tensors over the memory that was filled.

    Args:
        component: with its bindings and layouts.
        locate: gives the memory and the offset in it of a tensor that a parameter looks at directly.
        main: the slab of the component's layout; None: nothing lies in it.
        scratch: the slab of what is converted; None: nothing is.

    Returns:
        One tensor for each binding: parameters for parameters, plain tensors for buffers.
    """
    made: list[torch.Tensor] = []

    def converted(stored: Stored) -> torch.Tensor:
        return tensor_at(stored, scratch.array if scratch else None, component.scratch.offsets.get(stored.place, 0))

    for binding in component.bindings:
        meta = binding.meta
        if isinstance(binding.expression, Leaf):
            tensor = tensor_at(binding.expression.stored, *locate(binding.expression.stored))
        elif binding.fusion is not None and main is not None:
            start = component.layout.fused[binding.fusion]
            flat = torch.frombuffer(main.array, dtype=meta.dtype, count=meta.numel(), offset=start)
            tensor = flat.view(meta.shape)
        else:
            tensor = evaluate(binding.expression, converted)
        made.append(as_parameter(tensor) if binding.parameter else tensor)
    return made


def tensor_at(stored: Stored, memory: Any, offset: int) -> torch.Tensor:
    """A tensor over the bytes of ``stored`` that lie at ``offset`` of a buffer."""
    dtype, shape = torch_dtype(stored), torch_shape(stored)
    if not stored.length or memory is None:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=dtype, count=stored.length // dtype.itemsize, offset=offset)
    if stored.strides is None:
        return flat.view(shape)
    return flat.as_strided(stored.shape, stored.strides)
