"""Lends bytes of files to the lanes, one block at a time: its turn, its pin, and the blocks after it loaded ahead."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from modelcache_server.admission import Admission
from modelcache_server.cache import BlockCache, BlockKey, Pin
from modelcache_server.store import SMALL_FILE_BYTES, BlobStore, ServedFile
from modelcache_volume import BLOCK_BYTES, VolumeError

_log = logging.getLogger(__name__)
_REMEMBERED_ENDS = 1024
_LOADERS = 4


class Loan:
    """Bytes of one block, readable until `release` (or the end of `with`)."""

    __slots__ = ("_admission", "_client", "_pin", "view")

    def __init__(self, view: memoryview, pin: Pin | None, admission: Admission, client: str) -> None:
        self.view = view
        self._pin = pin
        self._admission = admission
        self._client = client

    def release(self) -> None:
        """Give the block and its share of the bytes in flight back."""
        if self._pin is not None:
            self._pin.release()
        self._admission.release(self._client, len(self.view))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the blocks' borders: (offset, length) of each piece."""
    end = offset + length
    while offset < end:
        border = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield offset, border - offset
        offset = border


class BlockReader:
    """Reads files of snapshots through the cache. Thread safe."""

    def __init__(
        self, cache: BlockCache, store: BlobStore, admission: Admission, *, read_ahead: int, queue_seconds: float
    ) -> None:
        """Read ahead by `read_ahead` blocks; wait at most `queue_seconds` for a turn and for a block."""
        self._cache = cache
        self._store = store
        self._admission = admission
        self._queue_seconds = queue_seconds
        self._depth = min(read_ahead, cache.window // 2)
        self._loaders = ThreadPoolExecutor(max_workers=_LOADERS, thread_name_prefix="read-ahead")
        self._lock = threading.Lock()
        self._ahead: set[BlockKey] = set()
        self._ends: OrderedDict[tuple[bytes, int], None] = OrderedDict()

    def horizon(self, file: ServedFile, offset: int, length: int) -> int:
        """Up to which byte of the file a reader of this range will want to read on.

        That is the range's end; or, if the range begins where another one ended, some blocks more.
        """
        end = offset + length
        with self._lock:
            sequential = (file.sha256, offset) in self._ends
            self._ends.pop((file.sha256, offset), None)
            self._ends[file.sha256, end] = None
            while len(self._ends) > _REMEMBERED_ENDS:
                self._ends.popitem(last=False)
        return min(file.size, end + self._depth * BLOCK_BYTES) if sequential else end

    def lend(
        self,
        file: ServedFile,
        offset: int,
        length: int,
        *,
        client: str,
        horizon: int = 0,
        timeout: float | None = None,
    ) -> Loan:
        """Lend the bytes [offset, offset + length) of one block (see `pieces`), and renew the snapshot's lease.

        Args:
            file: the file; the bytes must be inside it and not cross a block's border.
            offset: bytes from the file's beginning.
            length: bytes.
            client: whose share of the bytes in flight this is.
            horizon: up to which byte the reader will go on reading; blocks before it are loaded ahead.
            timeout: seconds to wait for a turn, and again for the block; the server's own limit holds too.

        Raises:
            RequestError: RESOURCE_EXHAUSTED when that is over.
            CorruptBlob, SnapshotNotFound, OSError: as `BlobStore.load`.
        """
        file.renew_lease()
        wait = self._queue_seconds if timeout is None else max(0.0, min(timeout, self._queue_seconds))
        self._admission.acquire(client, length, timeout=wait)
        try:
            if file.size < SMALL_FILE_BYTES:
                content = memoryview(self._store.read_small(file))
                return Loan(content[offset : offset + length], None, self._admission, client)
            block = offset // BLOCK_BYTES
            key = BlockKey(file.sha256, block)
            if horizon > (block + 1) * BLOCK_BYTES and self._depth:
                self._load_ahead(file, block + 1, min(block + self._depth, (horizon - 1) // BLOCK_BYTES))
            pin = self._cache.pin(
                key, file.block_length(block), lambda view: self._store.load(file, block, view), timeout=wait
            )
        except BaseException:
            self._admission.release(client, length)
            raise
        start = offset - block * BLOCK_BYTES
        return Loan(pin.view[start : start + length], pin, self._admission, client)

    def warm(self, file: ServedFile, block: int, *, used: bool = True) -> None:
        """Bring a block into the cache if it is not there; a small file is only checked. Raises as `BlobStore.load`."""
        if file.size < SMALL_FILE_BYTES:
            self._store.read_small(file)
            return
        self._cache.load_ahead(
            file.key(block), file.block_length(block), lambda view: self._store.load(file, block, view), used=used
        )

    def close(self) -> None:
        """Stop loading ahead."""
        self._loaders.shutdown(wait=True, cancel_futures=True)

    def _load_ahead(self, file: ServedFile, first: int, last: int) -> None:
        for block in range(first, last + 1):
            key = BlockKey(file.sha256, block)
            if key in self._cache:
                continue
            with self._lock:
                # More than the window holds would push out what was loaded ahead before it is read.
                if key in self._ahead or len(self._ahead) >= self._cache.window:
                    continue
                self._ahead.add(key)
            self._loaders.submit(self._load_one, file, block, key)

    def _load_one(self, file: ServedFile, block: int, key: BlockKey) -> None:
        start = time.perf_counter()
        try:
            self.warm(file, block, used=False)
        except (VolumeError, OSError) as error:
            # Whoever reads the block gets the error; here it only means that nothing was gained.
            _log.debug(
                "load ahead failed path=%s block=%d after=%.3fs: %s",
                file.path,
                block,
                time.perf_counter() - start,
                error,
            )
        finally:
            with self._lock:
                self._ahead.discard(key)
