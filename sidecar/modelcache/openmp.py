"""Has torch's threads give way to a thread that receives.

torch computes with OpenMP threads that wait for each other by spinning, for milliseconds before they sleep, unless
OpenMP counts more threads than cores. It does not count a thread that only receives. Where the cores are few they then
spin on the core that the receiver needs: on two, a pass that waits for the wire took a third longer. So a receiving
thread runs a parallel region of its own, whose one other thread sleeps as long as it receives.
https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["counted"]

# torch splits an operation between threads from so many elements on.
_GRAIN: Final = 32768
_PAUSE_SOFT: Final = 1  # omp_pause_soft of omp.h


def _openmp() -> Any:
    """The library that torch computes with, loaded for all to see; None: it has none, or one before OpenMP 5.0."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "omp_pause_resource_all") else None


_library: Final = _openmp()


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Has OpenMP count the calling thread meanwhile."""
    threads = torch.get_num_threads()
    if _library is None or threads == 1:
        yield
        return
    _library.omp_set_num_threads(2)
    torch.zeros(2 * _GRAIN, dtype=torch.uint8).add_(1)
    _library.omp_set_num_threads(threads)
    try:
        yield
    finally:
        _library.omp_pause_resource_all(_PAUSE_SOFT)
