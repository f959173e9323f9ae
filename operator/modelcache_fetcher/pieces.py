"""The memory of a partial file: which pieces of it were written, with their CRC-32C, in an append-only log beside it.

After a kill -9 the log says what need not be fetched again; the CRC says whether it can be believed, also after a power
failure that lost pages of the file but not of the log. A record that was cut off, or is damaged, is as good as absent.
"""

import bisect
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import crc32c

PIECE_BYTES = 2**20
"""The most that one piece holds, in bytes."""

_RECORD = struct.Struct("<QIII")
"""Offset, length, CRC-32C of the piece; CRC-32C of the 16 bytes before."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Bytes [offset, offset + length) of the file, all written."""

    offset: int
    length: int
    crc32c: int

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.length


class PieceMap:
    """The written pieces of one file: disjoint, by offset. No I/O."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def add(self, piece: Piece) -> None:
        """Add a piece; older ones that it overlaps are forgotten, for their bytes were overwritten."""
        first = bisect.bisect_left(self._pieces, piece.offset, key=lambda each: each.end - 1)
        last = bisect.bisect_left(self._pieces, piece.end, key=lambda each: each.offset)
        self._pieces[first:last] = [piece]

    def remove(self, piece: Piece) -> None:
        """Forget a piece."""
        self._pieces.remove(piece)

    def at(self, offset: int) -> Piece | None:
        """The piece that begins at an offset."""
        index = bisect.bisect_left(self._pieces, offset, key=lambda each: each.offset)
        if index < len(self._pieces) and self._pieces[index].offset == offset:
            return self._pieces[index]
        return None

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """The half-open ranges of [0, size) that no piece covers."""
        gaps: list[tuple[int, int]] = []
        position = 0
        for piece in self._pieces:
            if piece.offset > position:
                gaps.append((position, piece.offset))
            position = piece.end
        if position < size:
            gaps.append((position, size))
        return gaps

    @property
    def total(self) -> int:
        """Bytes covered."""
        return sum(piece.length for piece in self._pieces)


def log_path(part: Path) -> Path:
    """The log beside a partial file; its name makes it a partial file of its own for whoever tidies the volume."""
    return part.with_name(f"{part.stem}.log.part")


def load_pieces(part: Path, size: int) -> PieceMap:
    """What an earlier run has written of a file of ``size`` bytes; records that make no sense are left out."""
    pieces = PieceMap()
    try:
        written = part.stat().st_size
        log = log_path(part).read_bytes()
    except FileNotFoundError:
        return pieces
    for start in range(0, len(log) - _RECORD.size + 1, _RECORD.size):
        record = log[start : start + _RECORD.size]
        offset, length, crc, check = _RECORD.unpack(record)
        if check == crc32c.crc32c(record[:16]) and 0 < length <= PIECE_BYTES and offset + length <= min(size, written):
            pieces.add(Piece(offset, length, crc))
    return pieces


class PieceLog:
    """Appends records; one write per record, so that a kill leaves whole records and at most a cut-off last one."""

    def __init__(self, part: Path) -> None:
        path = log_path(part)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if rest := os.fstat(self._fd).st_size % _RECORD.size:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - rest)

    def append(self, piece: Piece) -> None:
        """Record a piece whose bytes were written."""
        record = _RECORD.pack(piece.offset, piece.length, piece.crc32c, 0)[:16]
        os.write(self._fd, record + crc32c.crc32c(record).to_bytes(4, "little"))

    def close(self) -> None:
        """Close the log."""
        os.close(self._fd)
