"""Blocks from the volume: read into a slot and compared with the manifest's checksum before anybody sees a byte."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import crc32c

from modelcache_server.cache import BlockKey
from modelcache_volume import BLOCK_BYTES, CorruptBlob

SMALL_FILE_BYTES = 256 * 1024
_OPEN_BLOBS = 256


@dataclass(frozen=True, eq=False)
class ServedFile:
    """One file of a snapshot, as the lanes need it.

    Attributes:
        path: in the snapshot.
        size: bytes.
        sha256: 32 bytes; the ETag is its hex.
        block_crc32c: CRC-32C of each aligned 4 MiB block.
        location: which blob on which source; blobs of one content in two sources are two files on disk.
        open: opens the blob for reading, or raises CorruptBlob or SnapshotNotFound.
        renew_lease: notes that the snapshot is being read; cheap enough to be called for each block.
    """

    path: str
    size: int
    sha256: bytes
    block_crc32c: Sequence[int]
    location: str
    open: Callable[[], int] = field(repr=False)
    renew_lease: Callable[[], None] = field(repr=False)

    def block_length(self, block: int) -> int:
        """Size of a block in bytes; the last may be shorter."""
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)

    def key(self, block: int) -> BlockKey:
        """The block's place in the cache."""
        return BlockKey(self.sha256, block)


class SharedTier(Protocol):
    """A second tier between the volume and the arena."""

    def fetch(self, key: BlockKey, crc: int, view: memoryview) -> bool:
        """Fill `view` with the block; False if it is not there or not right. Raises nothing."""

    def offer(self, key: BlockKey, view: memoryview) -> None:
        """Keep a copy of a block for other replicas, some time. Raises nothing, and does not wait."""


@dataclass(eq=False)
class _OpenBlob:
    fd: int
    users: int = 0


class BlobStore:
    """Reads blocks and small files of blobs, keeping a bounded number of them open. Thread safe."""

    def __init__(
        self, *, shared: SharedTier | None = None, observe: Callable[[str, float, int], None] | None = None
    ) -> None:
        """Read from volumes and from `shared`; `observe(tier, seconds, bytes)` is told of every block loaded."""
        self._shared = shared
        self._observe = observe
        self._lock = threading.Lock()
        self._blobs: OrderedDict[str, _OpenBlob] = OrderedDict()

    def load(self, file: ServedFile, block: int, view: memoryview) -> None:
        """Fill `view` with a whole block, verified.

        Raises:
            CorruptBlob: The volume has other bytes than were published.
            SnapshotNotFound: The snapshot was pruned.
            OSError: The volume cannot be read.
        """
        start = time.perf_counter()
        key, crc = file.key(block), file.block_crc32c[block]
        if self._shared is not None and self._shared.fetch(key, crc, view):
            self._report("redis", start, len(view))
            return
        self._read_verified(file, block, crc, view, drop_behind=True)
        self._report("volume", start, len(view))
        if self._shared is not None:
            self._shared.offer(key, view)

    def read_small(self, file: ServedFile) -> bytes:
        """The content of a file that bypasses the arena, verified. Raises as `load`."""
        start = time.perf_counter()
        content = bytearray(file.size)
        if file.size:
            self._read_verified(file, 0, file.block_crc32c[0], memoryview(content), drop_behind=False)
        self._report("small", start, file.size)
        return bytes(content)

    def close(self) -> None:
        """Close every blob; nobody may be reading any more."""
        with self._lock:
            blobs, self._blobs = self._blobs, OrderedDict()
        for blob in blobs.values():
            os.close(blob.fd)

    def _report(self, tier: str, start: float, size: int) -> None:
        if self._observe is not None:
            self._observe(tier, time.perf_counter() - start, size)

    def _read(self, file: ServedFile, offset: int, view: memoryview, *, drop_behind: bool) -> bool:
        """Fill `view`; False if the blob ends before."""
        blob = self._borrow(file)
        try:
            done = 0
            while done < len(view):
                got = os.preadv(blob.fd, [view[done:]], offset + done)
                if not got:
                    return False
                done += got
            if drop_behind:
                # The block is in the arena now; the kernel need not hold it too.
                os.posix_fadvise(blob.fd, offset, len(view), os.POSIX_FADV_DONTNEED)
            return True
        finally:
            self._give_back(file, blob)

    def _read_verified(self, file: ServedFile, block: int, crc: int, view: memoryview, *, drop_behind: bool) -> None:
        # A repaired blob is a new file under the old name, and the old one may still be open here: hence twice.
        for _ in range(2):
            whole = self._read(file, block * BLOCK_BYTES, view, drop_behind=drop_behind)
            if whole and crc32c.crc32c(view) == crc:
                return
            self._forget(file)
        raise CorruptBlob(
            f"Block {block} of {file.path} on the volume is not what was published. Fetch it again: "
            f"`modelcache verify` names every damaged file.",
            path=file.path,
            sha256=file.sha256.hex(),
            block=block,
        )

    def _forget(self, file: ServedFile) -> None:
        """Open the blob anew next time."""
        with self._lock:
            blob = self._blobs.pop(file.location, None)
            if blob is not None and not blob.users:
                os.close(blob.fd)

    def _borrow(self, file: ServedFile) -> _OpenBlob:
        with self._lock:
            blob = self._blobs.get(file.location)
            if blob is not None:
                self._blobs.move_to_end(file.location)
                blob.users += 1
                return blob
        fresh = _OpenBlob(file.open(), users=1)
        with self._lock:
            blob = self._blobs.get(file.location)
            if blob is None:
                self._blobs[file.location] = fresh
                while len(self._blobs) > _OPEN_BLOBS:
                    _, oldest = self._blobs.popitem(last=False)
                    if not oldest.users:
                        os.close(oldest.fd)
                return fresh
            blob.users += 1
        os.close(fresh.fd)
        return blob

    def _give_back(self, file: ServedFile, blob: _OpenBlob) -> None:
        with self._lock:
            blob.users -= 1
            if not blob.users and self._blobs.get(file.location) is not blob:
                os.close(blob.fd)
