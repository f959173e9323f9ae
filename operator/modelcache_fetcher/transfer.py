"""One file on its way: which ranges are still to fetch, which bytes are written, how far they are hashed.

Only the downloader touches a transfer, under its lock where threads share it.
"""

import bisect
import contextlib
import os
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache_fetcher.checksums import SourceHasher
from modelcache_fetcher.pieces import PieceLog, PieceMap, load_pieces, log_path
from modelcache_fetcher.plan import SourceFile
from modelcache_volume import (
    ContentDigests,
    IndexedFile,
    SafetensorsIndexer,
    index_torch_checkpoint,
    is_torch_checkpoint,
)

if TYPE_CHECKING:
    from modelcache_fetcher.sources import Location

MAX_RANGE_BYTES = 16 * 2**20
"""The most that one request asks for, in bytes."""
_MIN_RANGE_BYTES = 2 * 2**20


def range_bytes(total: int, concurrency: int) -> int:
    """What one request asks for, in bytes: at least two ranges for each receiver, so that none ends up idle."""
    return min(MAX_RANGE_BYTES, max(_MIN_RANGE_BYTES, total // (2 * concurrency)))


@dataclass(frozen=True, slots=True)
class Received:
    """A complete file, compared with what its source says about it.

    Attributes:
        file: What was planned.
        digests: Of its content.
        indexed: Its tensors, if it is a weight file.
    """

    file: SourceFile
    digests: ContentDigests
    indexed: IndexedFile | None


class ContentReader:
    """Everything that is computed from a file's bytes in one pass."""

    def __init__(self, file: SourceFile) -> None:
        wanted = {checksum.algorithm for checksum in file.checksums} - {"sha256"}
        self._file = file
        self._hasher = SourceHasher(file.size, sorted(wanted))
        self._indexer = SafetensorsIndexer(file.path, file.size) if file.path.endswith(".safetensors") else None

        self._hashing: Future[None] | None = None

    def update(self, data: memoryview) -> None:
        """Take the next bytes, in order. Raises BadWeights as soon as they cannot be a weight file."""
        self._hasher.update(data)
        if self._indexer is not None:
            self._indexer.update(data)

    def begin_update(self, data: memoryview, executor: Executor) -> None:
        """Like ``update``, but hashing goes on in another thread.

        Args:
            data: Must stay as it is until the next call of a method has returned.
            executor: Runs it.
        """
        if self._indexer is not None:
            self._indexer.update(data)
        self.wait()
        self._hashing = executor.submit(self._hasher.update, data)

    def wait(self) -> None:
        """Wait until all bytes given so far are hashed."""
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def finish(self, descriptor: int) -> tuple[Received | None, str]:
        """The complete file; or None and what differs from the source's checksums.

        Args:
            descriptor: The file, for formats that cannot be indexed while they stream by.

        Raises:
            BadWeights: It is no sound weight file.
        """
        self.wait()
        digests = self._hasher.result()
        for checksum in self._file.checksums:
            found = digests.sha256 if checksum.algorithm == "sha256" else digests.extra[checksum.algorithm]
            if found != checksum.value:
                return None, f"its {checksum.algorithm} is {found.hex()}, the source says {checksum.value.hex()}"
        indexed = self._indexer.finish() if self._indexer is not None else None
        if is_torch_checkpoint(self._file.path):
            indexed = index_torch_checkpoint(self._file.path, descriptor)
        return Received(self._file, digests, indexed), ""


class Transfer:
    """The state of one file's download."""

    def __init__(self, file: SourceFile, part: Path, step: int) -> None:
        self.file = file
        self.part = part
        self._step = step
        self.location: Location | None = None
        self.direct: Location | None = None
        """Where the location redirected to: asked instead until it is refused."""
        self.sequential = False
        """The server sends no ranges: one request brings everything."""
        self.active = 0
        """Receivers at work on it."""
        self.starting_over = False
        self.restarts = 0
        self.being_hashed = False
        self.done = False
        self.frontier = 0
        """Bytes hashed."""
        self.released = 0
        """Bytes whose pages were dropped."""
        self.pieces = PieceMap()
        self.kept: set[int] = set()
        """Offsets of the pieces that an earlier run has written: they wait on disk, not in memory."""
        self.pending: list[tuple[int, int]] = []
        self.fd = -1
        self.reader: ContentReader
        self._log: PieceLog | None = None

    def open(self) -> None:
        """Open the partial file and find what an earlier run has left of it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.reader = ContentReader(self.file)
        self.pieces = load_pieces(self.part, self.file.size)
        self.kept = {piece.offset for piece in self.pieces}
        self.fd = os.open(self.part, flags, 0o644)
        self._log = PieceLog(self.part)
        self._plan_ranges()

    def add_range(self, start: int, end: int) -> None:
        """Have [start, end) fetched."""
        bisect.insort(self.pending, (start, end))

    @property
    def log(self) -> PieceLog:
        """The log of pieces; the transfer is open."""
        if self._log is None:
            raise RuntimeError(f"{self.part} is not open")
        return self._log

    def reset(self) -> int:
        """Forget all bytes, to fetch them anew; nobody is at work on it. Returns how many were forgotten."""
        forgotten = self.pieces.total
        self.close()
        log_path(self.part).unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)
        self.frontier = self.released = 0
        self.starting_over = False
        self.location = self.direct = None
        self.open()
        return forgotten

    def close(self) -> None:
        """Close the files; what was received stays for the next run."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._log is not None:
            self._log.close()
            self._log = None

    def forget_log(self) -> None:
        """Remove the log of a file that is complete."""
        with contextlib.suppress(FileNotFoundError):
            log_path(self.part).unlink()

    def _plan_ranges(self) -> None:
        self.pending = [
            (start, min(start + self._step, gap_end))
            for gap_start, gap_end in self.pieces.gaps(self.file.size)
            for start in range(gap_start, gap_end, self._step)
        ]
