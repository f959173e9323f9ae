"""Checksums: of a snapshot, and of a file while it streams by."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import crc32c

from modelcache_volume.errors import ChecksumMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BLOCK_BYTES = 4 * 2**20
"""Size of a block in bytes: the unit of cache, checksum and Redis entry."""


@dataclass(frozen=True)
class ContentDigests:
    """Checksums of one file's content.

    Attributes:
        sha256: 32 bytes.
        block_crc32c: CRC-32C (RFC 3720) of each aligned 4 MiB block; the last may be shorter.
        extra: The algorithms asked for, by name; integers are big-endian bytes.
    """

    sha256: bytes
    block_crc32c: tuple[int, ...]
    extra: dict[str, bytes]


def snapshot_digest(files: Iterable[tuple[str, int, str]]) -> str:
    r"""Digest of a snapshot's content.

    Args:
        files: (sha256 in lowercase hex, size in bytes, path) of each file, in any order.

    Returns:
        sha256 (64 hex digits) of the lines "SHA256 SIZE PATH\\n", sorted by their bytes.
    """
    lines = sorted(f"{sha256} {size} {path}\n".encode() for sha256, size, path in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc:
    """A CRC-32 as a hash object."""

    def __init__(self, step: Callable[[memoryview, int], int]) -> None:
        self._step = step
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._step(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _git_blob(size: int) -> _Hash:
    # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects: the object is "blob SIZE\0" and the content.
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


_ALGORITHMS: dict[str, Callable[[int], _Hash]] = {
    "git-blob-sha1": _git_blob,
    "md5": lambda _size: hashlib.md5(usedforsecurity=False),
    "sha1": lambda _size: hashlib.sha1(usedforsecurity=False),
    "crc32c": lambda _size: _Crc(crc32c.crc32c),
    "crc32": lambda _size: _Crc(zlib.crc32),
}

ALGORITHMS = frozenset(_ALGORITHMS)
"""What `ContentHasher` can compute besides SHA-256 and the blocks' CRC-32C."""


class ContentHasher:
    """Computes every checksum of a file in one pass over its bytes, in chunks of any size.

    Args:
        size: Length of the content in bytes.
        algorithms: Names from `ALGORITHMS` to compute as well; "git-blob-sha1" is the Git object id of the content.

    Raises:
        ValueError: An algorithm is not known.
    """

    def __init__(self, size: int, algorithms: Sequence[str] = ()) -> None:
        unknown = set(algorithms) - ALGORITHMS
        if unknown:
            raise ValueError(f"unknown checksum algorithms: {', '.join(sorted(unknown))}")
        self._size = size
        self._seen = 0
        self._sha256 = hashlib.sha256()
        self._extra = {name: _ALGORITHMS[name](size) for name in algorithms}
        self._blocks: list[int] = []
        self._block_crc = 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes of the content (a contiguous buffer).

        Raises:
            ChecksumMismatch: There are more bytes than announced.
        """
        view = memoryview(data).cast("B")
        if self._seen + len(view) > self._size:
            raise ChecksumMismatch(f"More than the announced {self._size} bytes arrived.")
        self._sha256.update(view)
        for extra in self._extra.values():
            extra.update(view)
        while len(view):
            part = view[: BLOCK_BYTES - self._seen % BLOCK_BYTES]
            self._block_crc = crc32c.crc32c(part, self._block_crc)
            self._seen += len(part)
            if self._seen % BLOCK_BYTES == 0:
                self._blocks.append(self._block_crc)
                self._block_crc = 0
            view = view[len(part) :]

    def result(self) -> ContentDigests:
        """The checksums, once all bytes were given.

        Raises:
            ChecksumMismatch: Bytes are missing.
        """
        if self._seen != self._size:
            raise ChecksumMismatch(f"Only {self._seen} of {self._size} bytes arrived.")
        blocks = [*self._blocks, self._block_crc] if self._seen % BLOCK_BYTES else self._blocks
        extra = {name: value.digest() for name, value in self._extra.items()}
        return ContentDigests(self._sha256.digest(), tuple(blocks), extra)
