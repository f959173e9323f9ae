"""The memory that blocks are cached in: one private, anonymous mapping, cut into slots of one block each."""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

from modelcache_volume import BLOCK_BYTES


class Arena:
    """Exactly `size` bytes, in huge pages where the kernel gives them.

    Anonymous and private, never a file or shared memory: sending from it copies, so a slot may be filled anew as soon
    as `send` has returned (`sendfile` and `MSG_ZEROCOPY` share pages with the socket and would send the new content).
    """

    def __init__(self, size: int) -> None:
        if size <= 0 or size % BLOCK_BYTES:
            raise ValueError(f"an arena of {size} bytes is not a whole number of {BLOCK_BYTES}-byte slots")
        self.size = size
        self.slots = size // BLOCK_BYTES
        self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._whole = memoryview(self._mapping)

    def slot(self, index: int) -> memoryview:
        """The writable bytes of one slot."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of {self.slots}")
        start = index * BLOCK_BYTES
        return self._whole[start : start + BLOCK_BYTES]

    def page_use(self) -> tuple[int, int]:
        """(resident bytes, bytes of them in huge pages) of the mapping, as /proc/self/smaps says."""
        anchor = ctypes.c_char.from_buffer(self._whole)
        first = ctypes.addressof(anchor)
        del anchor
        return _page_use(Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace"), first, self.size)

    def close(self) -> None:
        """Give the memory back; where a view lives on (in an exception's traceback, say), once that is gone."""
        self._whole.release()
        with suppress(BufferError):
            self._mapping.close()


def _page_use(smaps: str, first: int, size: int) -> tuple[int, int]:
    """Sum the resident and huge-page bytes of the mappings within [first, first + size); neighbours may be merged."""
    resident = huge = 0
    inside = False
    for line in smaps.splitlines():
        head, _, rest = line.partition(" ")
        low, dash, high = head.partition("-")
        if dash and not head.endswith(":"):
            inside = int(low, 16) < first + size and int(high, 16) > first
        elif inside and head == "Rss:":
            resident += int(rest.split()[0]) * 1024
        elif inside and head == "AnonHugePages:":
            huge += int(rest.split()[0]) * 1024
    return min(resident, size), min(huge, size)
