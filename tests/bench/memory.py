"""Memory as the measured programs want it: huge pages that are there already, and a malloc that keeps what it has."""

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE (Linux 5.14), which Python 3.11's mmap does not name

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def prefaulted(size: int) -> memoryview:
    """Private anonymous memory of `size` bytes in huge pages, each touched.

    Python's default for `mmap(-1, n)` is shared memory in 4 KiB pages, and the first touch of a fresh page costs more
    than receiving its bytes. Neither belongs into a measurement of a transfer.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(_POPULATE_WRITE)
    return memoryview(memory)


def file_in_memory(path: Path) -> memoryview:
    """A file's content in such memory."""
    memory = prefaulted(path.stat().st_size)
    with path.open("rb") as file:
        file.readinto(memory)
    return memory


def touch(tensors: Iterable[Any]) -> None:
    """Read one byte of each page of torch tensors: only that brings a mapped file's pages into memory."""
    import torch

    for tensor in tensors:
        tensor.view(-1).view(torch.uint8)[::4096].sum()


def keep_freed_memory() -> None:
    """Have malloc serve messages of megabytes from its heap and keep it when they are freed.

    By default each such message is an mmap, page faults and an munmap, which nearly halves what grpcio does.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (2 << 30) - 1), (_M_TOP_PAD, 64 << 20)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt refused {parameter}={value}")


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far, mapped files included.

    Not getrusage's ru_maxrss: that one starts at the parent's size, which the process had between fork and exec.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
