"""A volume that this process can read itself is used in place of the wire, verified all the same.

Weights are mapped, as safetensors maps a file; what has to be put together (merged experts) is read into memory.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crc32c import crc32c

from modelcache.errors import IntegrityError
from modelcache.lane import CorruptAtServer, LaneBroken
from modelcache.plan import BLOCK_BYTES, Piece, coalesce
from modelcache_volume import Volume, VolumeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelcache.connection import PinnedSnapshot
    from modelcache.deadline import Deadline
    from modelcache.plan import Run, Stored
    from modelcache_volume import Snapshot
    from modelcache_volume.v1.manifest_pb2 import File

__all__ = ["VOLUME_VARIABLE", "VolumeSource", "local_volume"]

logger = logging.getLogger("modelcache")

VOLUME_VARIABLE: Final = "MODELCACHE_VOLUME"
# What one core checks at once.
_CHECK_BYTES: Final = 4 * BLOCK_BYTES
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, Linux 5.14; Python 3.11 has no name for it.
# Other file systems, and those that cannot copy by themselves.
_NOT_WITHIN: Final = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def local_volume(snapshot: PinnedSnapshot, environ: Mapping[str, str]) -> VolumeSource | None:
    """The snapshot on a volume that this process can read; None: there is none, and the wire is used.

    Args:
        snapshot: what is wanted; its server says where its volume is, which may be a folder of this machine too.
        environ: MODELCACHE_VOLUME names the folder where a volume is mounted; ``off`` has the wire used in any case.
    """
    given = environ.get(VOLUME_VARIABLE, "")
    root = given or snapshot.volume_path
    if not root or given == "off":
        return None
    try:
        found = Volume.open(Path(root)).snapshot(snapshot.digest)
    except (VolumeError, OSError) as error:
        if given:
            logger.warning("The volume at %s is not used, the wire is: %s", root, error)
        return None
    snapshot.manifest = found.manifest
    return VolumeSource(found)


class VolumeSource:
    """A snapshot on a volume of this machine. Its methods may be called from any thread.

    Args:
        snapshot: opened and of the digest that is wanted.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._maps: dict[str, mmap.mmap] = {}

    def open(self, path: str, offset: int, length: int, deadline: Deadline) -> VolumeStream:
        """Starts to read a range of a file."""
        deadline.remaining()
        try:
            return VolumeStream(self._snapshot.open_blob(self._snapshot.file(path)), offset, length, path)
        except VolumeError as error:
            raise CorruptAtServer(str(error)) from error

    def blame(self, error: LaneBroken) -> None:
        """There is no other place to read from."""

    def copy(self, file: File, target: int) -> bool:
        """Copies a file within its file system, which shares the blocks where it can (XFS, Btrfs); checks nothing.

        Args:
            file: of the manifest.
            target: descriptor of an empty file, opened for writing.

        Returns:
            False: the target is on another file system, or this one cannot; nothing was written.
        """
        try:
            blob = self._snapshot.open_blob(file)
        except VolumeError as error:
            raise IntegrityError(str(error), path=file.path) from error
        copied = 0
        try:
            while copied < file.size and (count := os.copy_file_range(blob, target, file.size - copied)):
                copied += count
        except OSError as error:
            if copied or error.errno not in _NOT_WITHIN:
                raise
        finally:
            os.close(blob)
        return copied > 0

    def map(self, path: str) -> mmap.mmap:
        """A file's bytes, in private pages that are shared with the page cache until they are written to."""
        with self._lock:
            if path not in self._maps:
                file = self._snapshot.file(path)
                try:
                    descriptor = self._snapshot.open_blob(file)
                except VolumeError as error:
                    raise IntegrityError(str(error), path=path) from error
                try:
                    self._maps[path] = mmap.mmap(descriptor, file.size, access=mmap.ACCESS_COPY)
                finally:
                    os.close(descriptor)
            return self._maps[path]

    def check(self, tensors: Iterable[Stored]) -> int:
        """Compares mapped tensors with their checksums and returns their bytes.

        Raises:
            IntegrityError: one differs from what was published.
        """
        return sum(self.check_run(run) for run in self.runs(tensors))

    def runs(self, tensors: Iterable[Stored]) -> tuple[Run, ...]:
        """Tensors in stretches of the files that can be checked apart."""
        pieces = (Piece(tensor, 0, tensor.length, 0) for tensor in tensors if tensor.length)
        return coalesce(pieces, run_bytes=_CHECK_BYTES)

    def check_run(self, run: Run) -> int:
        """As ``check``, for a stretch."""
        self._populate(run.path, run.offset, run.offset + run.length)
        with memoryview(self.map(run.path)) as view:
            for piece in run.pieces:
                tensor, known = piece.tensor, piece.tensor.crc[piece.begin // BLOCK_BYTES - 1] if piece.begin else 0
                with view[piece.offset : tensor.offset + piece.end] as data:
                    if crc32c(data, known) != tensor.crc[(piece.end - 1) // BLOCK_BYTES]:
                        raise IntegrityError(
                            f"Tensor {tensor.name!r} of {tensor.path} differs from what was published: the volume is "
                            "damaged. Run `modelcache fetch --verify` on it.",
                            path=tensor.path,
                            tensor=tensor.name,
                        )
        return sum(piece.end - piece.begin for piece in run.pieces)

    def _populate(self, path: str, first: int, last: int) -> None:
        """Maps all pages of a range in one system call; one fault for each few pages costs more than reading them."""
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        mapped = self.map(path)
        try:
            mapped.madvise(_POPULATE_READ, begin, last - begin)
        except OSError as error:
            if error.errno == errno.EFAULT:  # To read there would be SIGBUS, and the end of this process.
                raise IntegrityError(
                    f"{path} on the volume was cut off, or cannot be read, since it was mapped. "
                    "Run `modelcache fetch --verify` on it.",
                    path=path,
                ) from error
            if error.errno != errno.EINVAL:  # An older kernel: they come one fault after another.
                raise

    def forget(self, tensors: Iterable[Stored]) -> None:
        """Gives the pages of tensors back to the system; who still looks at them reads them again from the file."""
        for tensor in tensors:
            begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.offset + tensor.length - begin) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                self.map(tensor.path).madvise(mmap.MADV_DONTNEED, begin, length)


class VolumeStream:
    """Consecutive bytes of a blob."""

    def __init__(self, descriptor: int, offset: int, length: int, path: str) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._left = length
        self._path = path

    def read_into(self, view: memoryview) -> int:
        """Reads up to ``len(view)`` bytes, at least one."""
        count = os.preadv(self._descriptor, [view[: self._left]], self._offset)
        if count == 0:
            raise CorruptAtServer(f"{self._path} on the volume is shorter than it was published.")
        self._offset += count
        self._left -= count
        return count

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    discard = close

    def abort(self) -> None:
        """Nothing waits here."""
