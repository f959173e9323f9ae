"""Whole files of a snapshot, checked against their sha256."""

from __future__ import annotations

import fnmatch
import hashlib
from typing import TYPE_CHECKING, Final

from modelcache.errors import FileNotInSnapshot, IntegrityError
from modelcache.lane import CorruptAtServer, LaneBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from modelcache.connection import PinnedSnapshot
    from modelcache.deadline import Deadline
    from modelcache.reader import Source
    from modelcache_volume.v1.manifest_pb2 import File, Manifest

__all__ = ["find_file", "read_file", "select_files", "stream_file"]

_STEP_BYTES: Final = 2**20
_BACKOFF_SECONDS: Final = 0.1


def find_file(manifest: Manifest, path: str) -> File | None:
    """The manifest's entry of a file; None: the snapshot has no such file."""
    return next((file for file in manifest.files if file.path == path), None)


def select_files(
    manifest: Manifest, allow_patterns: Sequence[str] | None, ignore_patterns: Sequence[str] | None
) -> list[File]:
    """The files whose paths match, by the shell wildcards that the Hub uses.

    There ``*`` also matches ``/``, and ``onnx/`` is all of that folder.

    Args:
        manifest: of the snapshot.
        allow_patterns: a file must match one of them; None: all files.
        ignore_patterns: a file must match none of them.
    """
    return [
        file
        for file in manifest.files
        if (allow_patterns is None or _matches(file.path, allow_patterns))
        and not _matches(file.path, ignore_patterns or ())
    ]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, each + "*" if each.endswith("/") else each) for each in patterns)


def read_file(snapshot: PinnedSnapshot, path: str, deadline: Deadline) -> bytes:
    """Reads a small file into memory.

    Raises:
        FileNotInSnapshot: there is none; the message names what there is.
        IntegrityError: its sha256 differs.
    """
    file = find_file(snapshot.manifest, path)
    if file is None:
        there = ", ".join(each.path for each in snapshot.manifest.files[:8])
        raise FileNotInSnapshot(
            f"The snapshot {snapshot.digest[:12]} has no {path}; it has {there}. Do the allowPatterns leave it out?"
        )
    parts: list[bytes] = []
    stream_file(snapshot, file, lambda data: parts.append(bytes(data)), deadline)
    return b"".join(parts)


def stream_file(source: Source, file: File, write: Callable[[memoryview], object], deadline: Deadline) -> None:
    """Passes a file's bytes on in order, resuming where a connection broke.

    Raises:
        IntegrityError: its sha256 differs from the manifest's; what was written must be thrown away.
        Unavailable: no server delivered until the deadline.
    """
    digest = hashlib.sha256()
    for data in _parts(source, file, deadline):
        digest.update(data)
        write(data)
    if digest.digest() != file.sha256:
        raise IntegrityError(
            f"{file.path} differs from what was published. Run `modelcache fetch --verify`.", path=file.path
        )


def _parts(source: Source, file: File, deadline: Deadline) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_STEP_BYTES, file.size)))
    offset = corrupt = 0
    while offset < file.size:
        try:
            stream = source.open(file.path, offset, file.size - offset, deadline)
            try:
                while offset < file.size:
                    count = stream.read_into(buffer)
                    offset += count
                    deadline.delivered(count)
                    yield buffer[:count]
            except BaseException:
                stream.discard()
                raise
            stream.close()
        except LaneBroken as error:
            corrupt += isinstance(error, CorruptAtServer)
            if corrupt > 1:
                raise IntegrityError(str(error), path=file.path) from error
            source.blame(error)
            deadline.note(error)
            deadline.pause(_BACKOFF_SECONDS)
