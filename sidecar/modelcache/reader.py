"""Receives runs into memory, checking every tensor's running CRC-32C on the way.

A broken stream goes on at the byte where it broke, on whichever server answers, with the checksum's state kept. Bytes
whose checksum differs are read once more, over a new connection, from the last point that was right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from crc32c import crc32c

from modelcache.errors import IntegrityError
from modelcache.lane import CorruptAtServer, LaneBroken
from modelcache.plan import BLOCK_BYTES

if TYPE_CHECKING:
    from modelcache.deadline import Deadline
    from modelcache.lane import ByteStream
    from modelcache.plan import Piece, Run

__all__ = ["SMALL_STEP_BYTES", "STEP_BYTES", "Source", "read_run"]

# One system call, and one turn at the interpreter lock: a busy main thread gives it up only each 5 ms. The layer of a
# base model is two or three of these.
STEP_BYTES: Final = 4 * BLOCK_BYTES
# Where nothing computes meanwhile: checked while it is still in a core's cache, and with few calls.
SMALL_STEP_BYTES: Final = 2 * 2**20
_BACKOFF_SECONDS: Final = (0.0, 0.02, 0.1, 0.3, 0.5)


class Source(Protocol):
    """Opens ranges of one snapshot's files on whichever server answers."""

    def open(self, path: str, offset: int, length: int, deadline: Deadline) -> ByteStream:
        """Starts to read; raises LaneBroken when another attempt may succeed."""

    def blame(self, error: LaneBroken) -> None:
        """Says that the last stream failed, so that the next attempt goes elsewhere if it can."""


class _ChecksumDiffers(Exception):
    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.piece = piece


class _Progress:
    """How far a run has been received, and the checksum's state there."""

    def __init__(self, run: Run, step_bytes: int) -> None:
        self.run = run
        self.step_bytes = step_bytes
        self.index = 0
        self.position = run.pieces[0].begin
        self.crc = _known_crc(run.pieces[0])
        self.good = (self.position, self.crc)
        self.offset = run.offset

    @property
    def done(self) -> bool:
        return self.index == len(self.run.pieces)

    def next_piece(self) -> None:
        self.index += 1
        if not self.done:
            piece = self.run.pieces[self.index]
            self.position = piece.begin
            self.crc = _known_crc(piece)
            self.good = (self.position, self.crc)

    def stretch(self) -> int:
        """How many bytes from here lie next to each other in the file and in memory, at most step_bytes."""
        pieces = self.run.pieces
        last = pieces[self.index]
        length = last.end - self.position
        for piece in pieces[self.index + 1 :]:
            size = last.end - last.begin
            if length >= self.step_bytes or (piece.offset, piece.destination) != (
                last.offset + size,
                last.destination + size,
            ):
                break
            length += piece.end - piece.begin
            last = piece
        return min(length, self.step_bytes)

    def take(self, data: memoryview) -> None:
        """Checks bytes that have arrived, piece by piece; raises _ChecksumDiffers at the first that is wrong."""
        while data:
            piece = self.run.pieces[self.index]
            tensor = piece.tensor
            check = min((self.position // BLOCK_BYTES + 1) * BLOCK_BYTES, tensor.length)
            count = min(len(data), check - self.position)
            self.crc = crc32c(data[:count], self.crc)
            self.position += count
            self.offset += count
            data = data[count:]
            if self.position == check:
                if self.crc != tensor.crc[(check - 1) // BLOCK_BYTES]:
                    raise _ChecksumDiffers(piece)
                self.good = (self.position, self.crc)
                if check == piece.end:
                    self.next_piece()

    def rewind(self) -> None:
        """Back to the last point of this piece whose checksum was right."""
        self.position, self.crc = self.good
        self.offset = self.run.pieces[self.index].tensor.offset + self.position


def read_run(source: Source, run: Run, memory: memoryview, deadline: Deadline, step_bytes: int = STEP_BYTES) -> int:
    """Reads all pieces of ``run`` into ``memory`` (the whole slab) and returns how many bytes came over the wire.

    Raises:
        IntegrityError: a tensor's checksum differs twice, or the server knows that its copy is damaged.
        Unavailable: no server delivered until the deadline.
        RevisionGone: the snapshot was removed.
    """
    progress = _Progress(run, step_bytes)
    end = run.offset + run.length
    failures = corrupt = 0
    received = 0
    differed: set[tuple[str, int]] = set()
    while not progress.done:
        before = progress.offset
        stream: ByteStream | None = None
        try:
            stream = source.open(run.path, progress.offset, end - progress.offset, deadline)
            _receive(stream, progress, memory, deadline)
        except _ChecksumDiffers as error:
            received += progress.offset - before
            _discard(stream)
            key = (error.piece.tensor.name, progress.good[0])
            if key in differed:
                raise _integrity_error(error.piece, run.path) from None
            differed.add(key)
            source.blame(LaneBroken(f"{run.path} arrived damaged."))
            progress.rewind()
            continue
        except LaneBroken as error:
            received += progress.offset - before
            _discard(stream)
            source.blame(error)
            deadline.note(error)
            corrupt += isinstance(error, CorruptAtServer)
            if corrupt > 1:
                raise IntegrityError(
                    f"{error} Run `modelcache fetch --verify` on the volume.", path=run.path
                ) from error
            failures = 0 if progress.offset > before else failures + 1
            deadline.pause(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
            continue
        except BaseException:
            _discard(stream)
            raise
        received += progress.offset - before
        stream.close()
    return received


def _receive(stream: ByteStream, progress: _Progress, memory: memoryview, deadline: Deadline) -> None:
    while not progress.done:
        piece = progress.run.pieces[progress.index]
        hole = piece.tensor.offset + progress.position - progress.offset
        if hole:
            _skip(stream, hole, progress)
        start = piece.destination + progress.position - piece.begin
        count = stream.read_into(memory[start : start + progress.stretch()])
        progress.take(memory[start : start + count])
        deadline.delivered(count)


def _skip(stream: ByteStream, count: int, progress: _Progress) -> None:
    scratch = memoryview(bytearray(count))
    while count:
        got = stream.read_into(scratch[:count])
        progress.offset += got
        count -= got


def _discard(stream: ByteStream | None) -> None:
    if stream is not None:
        stream.discard()


def _known_crc(piece: Piece) -> int:
    return piece.tensor.crc[piece.begin // BLOCK_BYTES - 1] if piece.begin else 0


def _integrity_error(piece: Piece, path: str) -> IntegrityError:
    return IntegrityError(
        f"Tensor {piece.tensor.name!r} of {path} differs from what was published, twice in a row. "
        "Run `modelcache fetch --verify` on the volume; if that finds nothing, the network damages data.",
        path=path,
        tensor=piece.tensor.name,
    )
