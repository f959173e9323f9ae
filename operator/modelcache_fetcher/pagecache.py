"""Keeps a file's pages from piling up in memory: written out early, dropped once they are not needed again.

Inside a container the page cache counts against the memory limit, so a fetch of any size must leave none behind.
"""

import ctypes
import os

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4

# Not in Python's os module: https://man7.org/linux/man-pages/man2/sync_file_range.2.html
_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have the kernel write these bytes to disk, without waiting. A file system that cannot writes them later."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _WRITE)


def drop_written(fd: int, offset: int, length: int) -> None:
    """Wait until these bytes are on disk, then drop their pages."""
    whole = _WAIT_BEFORE | _WRITE | _WAIT_AFTER
    if _sync_file_range is None or _sync_file_range(fd, offset, length, whole) != 0:
        os.fdatasync(fd)
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
