"""The memory that blocks are cached in: one private, anonymous mapping, cut into slots of one block each."""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

from modelcache_server.errors import ServerError
from modelcache_volume import BLOCK_BYTES

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python 3.11 does not name
_PREFAULT_STEP_BYTES = 64 << 20


class Arena:
    """Exactly `size` bytes, in huge pages where the kernel gives them.

    Anonymous and private, never a file or shared memory: sending from it copies, so a slot may be filled anew as soon
    as `send` has returned (`sendfile` and `MSG_ZEROCOPY` share pages with the socket and would send the new content).
    """

    def __init__(self, size: int) -> None:
        """Reserve the memory. Raises ServerError when there is not so much."""
        if size <= 0 or size % BLOCK_BYTES:
            raise ValueError(f"an arena of {size} bytes is not a whole number of {BLOCK_BYTES}-byte slots")
        self.size = size
        self.slots = size // BLOCK_BYTES
        try:
            self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ServerError(
                f"A block cache of {size >> 20} MiB is more than this machine gives ({error.strerror}). "
                "Choose a smaller --cache-size."
            ) from error
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._whole = memoryview(self._mapping)

    def slot(self, index: int) -> memoryview:
        """The writable bytes of one slot."""
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index} of {self.slots}")
        start = index * BLOCK_BYTES
        return self._whole[start : start + BLOCK_BYTES]

    def prefault(self) -> None:
        """Have the kernel give all of it now: the first touch of a fresh page costs more than receiving its bytes."""
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        first = self._address()
        # In steps, and not through mmap.madvise, which would hold the interpreter's lock meanwhile.
        for start in range(0, self.size, _PREFAULT_STEP_BYTES):
            if madvise(first + start, min(_PREFAULT_STEP_BYTES, self.size - start), _POPULATE_WRITE):
                return  # Linux before 5.14: pages come as they are used

    def page_use(self) -> tuple[int, int]:
        """(resident bytes, bytes of them in huge pages) of the mapping, as /proc/self/smaps says."""
        smaps = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
        return _page_use(smaps, self._address(), self.size)

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._whole))

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
