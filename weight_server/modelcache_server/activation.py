"""Follows the active pointer: new blocks are warmed first, then clients are told. No restart, no torn reads."""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from modelcache_server.cache import BlockCache, BlockKey
from modelcache_server.catalog import Catalog, Origin, ServedSnapshot
from modelcache_server.reader import BlockReader
from modelcache_server.store import SMALL_FILE_BYTES, ServedFile
from modelcache_volume import CorruptBlob, NoActiveRevision, VolumeError
from modelcache_volume.v1 import manifest_pb2

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 30.0
_WARMERS = 4


class ActivationWatch:
    """A thread that looks at the pointer every `poll_seconds`.

    Attributes:
        problem: why nothing is announced, or why what the pointer names is not; empty when all is well.
    """

    def __init__(
        self,
        origin: Origin,
        catalog: Catalog,
        cache: BlockCache,
        reader: BlockReader,
        *,
        warmup_bytes: int | None,
        poll_seconds: float,
        prepare: Callable[[], None],
        on_first: Callable[[], None],
    ) -> None:
        """Call `prepare` in the thread, before anything else, and `on_first` once there is something to serve."""
        self._origin = origin
        self._catalog = catalog
        self._cache = cache
        self._reader = reader
        self._warmup_bytes = warmup_bytes
        self._poll_seconds = poll_seconds
        self._prepare = prepare
        self._on_first = on_first
        self._seen: Hashable = None
        self._retry_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="activation", daemon=True)
        self.announced = threading.Event()
        self.problem = "the active revision was not read yet"
        self.activations = 0

    def start(self) -> None:
        """Learn what is active, so that its digests are served from the first request on; warm and announce later."""
        try:
            self._catalog.adopt(self._origin.active())
        except (VolumeError, OSError) as error:
            self.problem = str(error)
        else:
            self.problem = "the cache is being warmed up"
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._prepare()
        while not self._stop.is_set():
            try:
                self._look()
            except (VolumeError, OSError) as error:
                if str(error) != self.problem:
                    _log.warning("active revision not served: %s", error)
                self.problem = str(error)
            except Exception as error:  # noqa: BLE001 - a bug must not end the watching
                _log.exception("following the active revision failed")
                self.problem = f"internal error: {error!r}"
            self._stop.wait(self._poll_seconds)

    def _look(self) -> None:
        self._catalog.forget_pruned()
        marker = self._origin.marker()
        if marker == self._seen and not (self.problem and time.monotonic() >= self._retry_at):
            return
        self._retry_at = time.monotonic() + (_RETRY_SECONDS if self.announced.is_set() else 0.0)
        self._seen = marker
        try:
            active = self._origin.active()
        except NoActiveRevision:
            if self.announced.is_set():  # deactivated: those who read go on, and nothing new is announced
                self.problem = ""
                return
            raise
        before = self._catalog.announced
        if before is not None and before.active == active:
            self.problem = ""
            return
        self._activate(active, before.snapshot if before else None)

    def _activate(self, active: manifest_pb2.Active, before: ServedSnapshot | None) -> None:
        start = time.monotonic()
        snapshot = self._catalog.adopt(active)
        if before is not None:
            kept = {key for key, _, _ in _blocks(snapshot)}
            self._cache.retire(key for key, _, _ in _blocks(before) if key not in kept)
        try:
            self._warm(snapshot)
        except CorruptBlob as error:
            # What was active keeps serving. A fresh server has nothing better: its readers get the error for that
            # file alone, and all other files.
            if before is not None:
                raise
            _log.error("active snapshot is damaged digest=%s: %s", snapshot.digest, error)
        if self._stop.is_set():
            return
        self._catalog.announce(active, snapshot)
        self.problem = ""
        self.activations += 1
        if not self.announced.is_set():
            self.announced.set()
            self._on_first()
        _log.info(
            "serving name=%s digest=%s commit=%s generation=%d warmed_in=%.2fs",
            active.name,
            active.digest,
            active.commit,
            active.generation,
            time.monotonic() - start,
        )

    def _warm(self, snapshot: ServedSnapshot) -> None:
        """Load the snapshot's first blocks, as many as the settings and the cache allow, and check its small files."""
        wanted: list[tuple[ServedFile, int]] = []
        if self._warmup_bytes != 0:
            wanted = [(file, 0) for file in snapshot.files.values() if file.size < SMALL_FILE_BYTES]
            wanted += islice(_first_blocks(snapshot, self._warmup_bytes), self._cache.capacity)
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(max_workers=_WARMERS, thread_name_prefix="warm-up") as pool:
            try:
                for file, block in wanted:
                    if len(running) >= 2 * _WARMERS:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        _raise_first(done)
                    if self._stop.is_set():
                        break
                    running.add(pool.submit(self._reader.warm, file, block))
                _raise_first(wait(running).done)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()


def _first_blocks(snapshot: ServedSnapshot, size: int | None) -> Iterator[tuple[ServedFile, int]]:
    """The blocks that hold the first `size` bytes; None: all."""
    before = 0
    for _, file, block in _blocks(snapshot):
        if size is not None and before >= size:
            return
        yield file, block
        before += file.block_length(block)


def _blocks(snapshot: ServedSnapshot) -> Iterator[tuple[BlockKey, ServedFile, int]]:
    """The snapshot's blocks that go through the arena, once each."""
    seen = set()
    for file in snapshot.files.values():
        if file.size < SMALL_FILE_BYTES or file.sha256 in seen:
            continue
        seen.add(file.sha256)
        for block in range(len(file.block_crc32c)):
            yield file.key(block), file, block
