"""Memory for weights: huge-page slabs, faulted in once and used again and again.

Python's own ``mmap(-1, n)`` is shared memory in 4 KiB pages, ten times slower to fault in than private memory with
``MADV_HUGEPAGE``; fresh memory of either kind costs more than receiving the bytes. So slabs are private, huge, touched
before use, and kept. A slab goes back to the pool only when the last tensor over it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import threading
import weakref
from collections import defaultdict
from typing import Final

__all__ = ["ALIGNMENT", "Lease", "SlabPool"]

ALIGNMENT: Final = 64
_HUGE_PAGE: Final = 2 * 2**20
_PAGE: Final = 4096
_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14; Python 3.11 has no name for it.


class _Slab:
    """A private anonymous mapping whose usable part starts on a huge page."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=flags)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.start = -address % _HUGE_PAGE
        self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.prefault()

    def prefault(self) -> None:
        try:
            self.mapping.madvise(_POPULATE_WRITE, self.start, self.nbytes)
        except OSError:  # An older kernel: touch each page instead.
            with memoryview(self.mapping) as view:
                view[self.start : self.start + self.nbytes : _PAGE] = bytes(self.nbytes // _PAGE)

    def array(self) -> ctypes.Array[ctypes.c_char]:
        return (ctypes.c_char * self.nbytes).from_buffer(self.mapping, self.start)


class Lease:
    """The right to use a slab, until the last reference to ``array`` (or a tensor over it) is gone.

    Attributes:
        array: the memory, as an object with the buffer protocol; hand it to ``torch.frombuffer``.
        nbytes: size of the slab in bytes, at least what was asked for.
    """

    __slots__ = ("__weakref__", "array", "nbytes")

    def __init__(self, array: ctypes.Array[ctypes.c_char], nbytes: int) -> None:
        self.array = array
        self.nbytes = nbytes

    def view(self) -> memoryview:
        """The memory as writable bytes."""
        return memoryview(self.array).cast("B")


class SlabPool:
    """Slabs that are used again, shared by all models of a process.

    Args:
        keep_bytes: free slabs above this many bytes go back to the system.
    """

    def __init__(self, keep_bytes: int = 256 * 2**20) -> None:
        self.keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._free: defaultdict[int, list[_Slab]] = defaultdict(list)
        # A finalizer may run anywhere, also inside `take` of the same thread: it may only do what is reentrant.
        self._returned: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of slabs that tensors still look at."""
        with self._lock:
            self._collect()
            return self._used

    @property
    def free_bytes(self) -> int:
        """Bytes of slabs that wait to be used again."""
        with self._lock:
            self._collect()
            return self._free_bytes()

    def take(self, nbytes: int) -> Lease:
        """Gives memory of at least ``nbytes`` bytes, its first byte at 0 modulo 2 MiB, already faulted in."""
        size = max(_HUGE_PAGE, -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE)
        with self._lock:
            self._collect()
            slabs = self._free.get(size)
            slab = slabs.pop() if slabs else self._fitting(size)
            self._used += slab.nbytes if slab else size
        if slab is None:
            try:
                slab = _Slab(size)
            except BaseException:
                with self._lock:
                    self._used -= size
                raise
        array = slab.array()
        weakref.finalize(array, self._returned.put, slab).atexit = False
        return Lease(array, slab.nbytes)

    def reserve(self, nbytes: int, slab_bytes: int) -> None:
        """Faults in free slabs of ``slab_bytes`` until the pool has ``nbytes`` of them."""
        size = max(_HUGE_PAGE, -(-slab_bytes // _HUGE_PAGE) * _HUGE_PAGE)
        while True:
            with self._lock:
                self._collect()
                if size * len(self._free[size]) >= nbytes:
                    return
            slab = _Slab(size)
            with self._lock:
                self._free[size].append(slab)

    def trim(self, keep_bytes: int = 0) -> None:
        """Gives free slabs back to the system until at most ``keep_bytes`` bytes of them are left."""
        with self._lock:
            self._collect()
            self._trim(keep_bytes)

    def _fitting(self, size: int) -> _Slab | None:
        """A free slab that is not much too large."""
        sizes = sorted(key for key, slabs in self._free.items() if slabs and size <= key <= size + size // 4)
        return self._free[sizes[0]].pop() if sizes else None

    def _collect(self) -> None:
        while True:
            try:
                slab = self._returned.get_nowait()
            except queue.Empty:
                break
            self._used -= slab.nbytes
            self._free[slab.nbytes].append(slab)
        self._trim(self.keep_bytes)

    def _free_bytes(self) -> int:
        return sum(size * len(slabs) for size, slabs in self._free.items())

    def _trim(self, keep_bytes: int) -> None:
        excess = self._free_bytes() - keep_bytes
        for size in sorted(self._free, reverse=True):
            while excess > 0 and self._free[size]:
                self._free[size].pop()
                excess -= size
