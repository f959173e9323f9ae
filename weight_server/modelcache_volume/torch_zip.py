"""The directory of a zip file whose entries are stored, as torch.save writes it.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT. Unlike zipfile it takes no liberties: an archive
that two readers could understand differently (entries that overlap or occur twice, bytes before it, several disks) is
refused, and so is anything compressed: torch stores tensors as they are, and what is not inflated cannot be a bomb.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

MAX_DIRECTORY_BYTES = 64 * 2**20
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX32 = 0xFFFFFFFF
_ENCRYPTED = 0x1 | 0x40 | 0x2000

Read = Callable[[int, int], bytes]
"""Gives exactly `length` bytes at `offset` of the file, or raises an error of its own."""


class RefusedZipError(Exception):
    """The archive is malformed, or is not one that torch.save writes; the message says why."""


@dataclass(frozen=True)
class ZipEntry:
    """One stored file of an archive.

    Attributes:
        name: As the archive spells it.
        header: Where its local header begins.
        offset: Where its bytes begin.
        size: How many they are.
    """

    name: str
    header: int
    offset: int
    size: int


def read_zip_directory(read: Read, size: int) -> dict[str, ZipEntry]:
    """Reads where the entries of an archive lie.

    Args:
        read: Gives bytes of the file.
        size: Of the file, in bytes.

    Returns:
        The entries by name.

    Raises:
        RefusedZipError: See above.
    """
    start, length, count = _find_directory(read, size)
    directory = read(start, length)
    entries: dict[str, ZipEntry] = {}
    position = 0
    for _ in range(count):
        entry, position = _read_entry(read, directory, position, start)
        if entry.name in entries:
            raise RefusedZipError(f"the entry {entry.name[:100]!r} occurs twice")
        entries[entry.name] = entry
    if position != length:
        raise RefusedZipError("its directory has another length than it says")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.header):
        if entry.header < end:
            raise RefusedZipError(f"the entry {entry.name[:100]!r} overlaps another")
        end = entry.offset + entry.size
    if end > start:
        raise RefusedZipError("an entry overlaps the directory")
    return entries


def _find_directory(read: Read, size: int) -> tuple[int, int, int]:
    """Start, length in bytes and number of entries of the directory."""
    # The end record is last; torch writes no comment, and with one it would not be the only possible reading.
    position = size - _END.size
    if position < 0:
        raise RefusedZipError("it is cut off")
    signature, disk, start_disk, here, count, length, start, comment = _END.unpack(read(position, _END.size))
    if signature != b"PK\5\6" or comment:
        raise RefusedZipError("it does not end as a zip file ends: it is cut off, or has a comment")
    end = position
    locator = position - _END64_LOCATOR.size
    if locator >= 0 and read(locator, 4) == b"PK\6\7":
        _, start_disk, end, disks = _END64_LOCATOR.unpack(read(locator, _END64_LOCATOR.size))
        if end + _END64.size != locator or disks > 1:
            raise RefusedZipError("its zip64 end record is not where it should be")
        signature, _, _, _, disk, _, here, count, length, start = _END64.unpack(read(end, _END64.size))
        if signature != b"PK\6\6":
            raise RefusedZipError("its zip64 end record is damaged")
    if disk or start_disk or here != count:
        raise RefusedZipError("it spans several disks")
    if start + length != end or length > MAX_DIRECTORY_BYTES or count * _ENTRY.size > length:
        raise RefusedZipError("its directory is not where it says, or has another length")
    return start, length, count


def _read_entry(read: Read, directory: bytes, position: int, limit: int) -> tuple[ZipEntry, int]:
    if len(directory) - position < _ENTRY.size:
        raise RefusedZipError("its directory is cut off")
    fields = _ENTRY.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, _, stored, size, name_length, extra_length, comment_length = fields[:13]
    disk, header = fields[13], fields[16]
    position += _ENTRY.size
    raw_name = directory[position : position + name_length]
    extra = directory[position + name_length : position + name_length + extra_length]
    position += name_length + extra_length + comment_length
    if signature != b"PK\1\2" or position > len(directory):
        raise RefusedZipError("its directory is damaged")
    try:
        name = raw_name.decode()
    except UnicodeDecodeError as error:
        raise RefusedZipError("an entry's name is not UTF-8") from error
    if _MAX32 in {stored, size, header}:
        stored, size, header = _zip64_values(extra, stored, size, header)
    if method or flags & _ENCRYPTED or stored != size:
        raise RefusedZipError(f"the entry {name[:100]!r} is compressed or encrypted, which torch.save never does")
    if disk or header + _LOCAL.size > limit:
        raise RefusedZipError(f"the entry {name[:100]!r} lies outside the file")
    local = _LOCAL.unpack(read(header, _LOCAL.size))
    if local[0] != b"PK\3\4" or local[3] or read(header + _LOCAL.size, local[9]) != raw_name:
        raise RefusedZipError(f"the entry {name[:100]!r} is not where the directory says")
    offset = header + _LOCAL.size + local[9] + local[10]
    if offset + size > limit:
        raise RefusedZipError(f"the entry {name[:100]!r} is cut off")
    return ZipEntry(name, header, offset, size), position


def _zip64_values(extra: bytes, stored: int, size: int, header: int) -> tuple[int, int, int]:
    """The three numbers, each taken from the zip64 field when it does not fit the entry (APPNOTE 4.5.3)."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1:
            numbers = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            try:
                size = numbers.pop(0) if size == _MAX32 else size
                stored = numbers.pop(0) if stored == _MAX32 else stored
                header = numbers.pop(0) if header == _MAX32 else header
            except IndexError as error:
                raise RefusedZipError("a zip64 field is cut off") from error
            return stored, size, header
    raise RefusedZipError("a zip64 field is missing")
