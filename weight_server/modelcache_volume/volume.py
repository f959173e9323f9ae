"""A volume as readers see it: what is published, what is active, and the bytes, checked."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from modelcache_volume import disk
from modelcache_volume.digest import BLOCK_BYTES, ContentHasher
from modelcache_volume.errors import (
    ChecksumMismatch,
    CorruptBlob,
    FileNotInSnapshot,
    NoActiveRevision,
    NotAVolume,
    SnapshotNotFound,
    VolumeError,
)
from modelcache_volume.layout import FORMAT_VERSION, LEASE_SECONDS, Layout, is_digest, is_name, is_source_folder
from modelcache_volume.lock import writer_lock
from modelcache_volume.records import check_format_version, decode_record, manifest_problem
from modelcache_volume.v1 import manifest_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelcache_volume.writer import VolumeWriter

_LOG = logging.getLogger(__name__)
_LEASES_MODE = 0o775
_NOT_THE_BLOB = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EIO}
# What may lie in a folder that is to become a volume: ext4 makes the first, an interrupted `create` the others.
_HARMLESS = frozenset({"lost+found", ".lock", ".tmp"})
_CREATE_SECONDS = 10


@dataclass(frozen=True)
class Problem:
    """Something on the volume that is not as it was published.

    Attributes:
        path: The file's path in its snapshot, or a path on the volume.
        what: What is wrong with it, as a sentence.
    """

    path: str
    what: str


class Volume:
    """A volume, opened for reading; `lock` gives the writer.

    Args:
        root: The volume's top folder; use `open` or `create`, which check it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = Layout(root)

    def __repr__(self) -> str:
        return f"Volume({str(self.root)!r})"

    @classmethod
    def create(cls, root: Path) -> Volume:
        """Makes an empty or missing folder a volume; opens it if it is one already.

        Raises:
            NotAVolume: There is something else in the folder.
            NewerFormat: It is a volume of a newer program.
            NoSpace: It is full.
        """
        root = root.absolute()
        volume = cls(root)
        with disk.space_errors(root, "setting it up"):
            if not volume.layout.format.exists():
                if root.exists() and (not root.is_dir() or not _HARMLESS.issuperset(_names(root))):
                    raise NotAVolume(
                        f"{root} is neither empty nor a ModelCache volume (it has no FORMAT file), and nothing was "
                        "written to it: name an empty or a new folder."
                    )
                disk.make_folder(volume.layout.temporary)
                with writer_lock(volume.layout.lock, wait=_CREATE_SECONDS):
                    temporary = volume.layout.temporary / "FORMAT"
                    disk.write_durably(volume.layout.format, f"{FORMAT_VERSION}\n".encode(), temporary)
            cls.open(root)
            volume._make_folders()
        return volume

    @classmethod
    def open(cls, root: Path) -> Volume:
        """Opens a volume; writes nothing.

        Raises:
            NotAVolume: The folder is none.
            NewerFormat: It is one of a newer program.
        """
        root = root.absolute()
        volume = cls(root)
        try:
            text = volume.layout.format.read_bytes()[:20].decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotAVolume(
                f"{root} is not a ModelCache volume: it has no FORMAT file. Fetch a model into it first, or name "
                "the folder that holds hub/ and active/."
            ) from None
        if not text.strip().isdecimal():
            raise NotAVolume(f"{root} is not a ModelCache volume: its FORMAT file does not hold a number.")
        check_format_version(int(text), f"The volume {root}")
        return volume

    def snapshots(self, folder: str = "") -> list[Snapshot]:
        """The published snapshots; damaged ones are left out (see `damaged`) and logged.

        Args:
            folder: Of one source; "": of all.
        """
        found = []
        for home, digest in self._published(folder):
            try:
                found.append(self._read_snapshot(home, digest))
            except CorruptBlob as error:
                _LOG.warning("%s", error)
            except FileNotFoundError:  # pruned meanwhile
                continue
        return found

    def damaged(self) -> list[Problem]:
        """The manifests that cannot be read; `snapshots` leaves them out."""
        problems = []
        for folder, digest in self._published():
            try:
                self._read_snapshot(folder, digest)
            except CorruptBlob as error:
                problems.append(Problem(error.path, str(error)))
            except FileNotFoundError:
                continue
        return problems

    def snapshot(self, digest: str, folder: str = "") -> Snapshot:
        """The snapshot with that content.

        Args:
            digest: 64 hex digits.
            folder: Its source's folder; "": whichever has it.

        Raises:
            SnapshotNotFound: There is none.
            CorruptBlob: Its manifest is damaged.
            NewerFormat: A newer program wrote it.
        """
        damage: CorruptBlob | None = None
        for candidate in [folder] if folder else self.source_folders():
            try:
                return self._read_snapshot(candidate, digest)
            except FileNotFoundError:
                continue
            except CorruptBlob as error:
                damage = damage or error
        if damage:
            raise damage
        raise SnapshotNotFound(
            f"The volume {self.root} has no snapshot {digest}: it was never fetched, or was pruned. "
            "Ask for the active revision, or fetch it again."
        )

    def active(self, name: str) -> manifest_pb2.Active:
        """What is served for `name`.

        Raises:
            NoActiveRevision: Nothing is.
            CorruptBlob: The record is damaged.
            NewerFormat: A newer program wrote it.
        """
        path = self.layout.active(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NoActiveRevision(
                f"Nothing is active under the name {name!r} on the volume {self.root}: fetch it first."
            ) from None
        active = decode_record(manifest_pb2.Active, data, str(path))
        check_format_version(active.format_version, str(path))
        if active.name != name:
            raise CorruptBlob(f"{path} is the record of {active.name!r}: it was copied or renamed.", path=str(path))
        return active

    def actives(self) -> list[manifest_pb2.Active]:
        """All active records, sorted by name; the errors are those of `active`."""
        files = [name for name in _names(self.layout.actives) if name.endswith(".pb")]
        found = []
        for name in sorted(file.removesuffix(".pb") for file in files if is_name(file)):
            with suppress(NoActiveRevision):  # deactivated meanwhile
                found.append(self.active(name))
        return found

    def renew_lease(self, digest: str, holder: str) -> None:
        """Notes that `holder` reads `digest`: pruning spares it for the next 10 minutes (`LEASE_SECONDS`).

        Args:
            digest: Of a published snapshot.
            holder: Who reads, such as a pod's name.

        Raises:
            SnapshotNotFound: There is none.
            VolumeError: leases/ cannot be written.
        """
        path = self.layout.lease(digest, holder)
        if not any(self.layout.manifest(folder, digest).exists() for folder in self.source_folders()):
            raise SnapshotNotFound(f"The volume {self.root} has no snapshot {digest}: there is nothing to lease.")
        with disk.space_errors(self.root, "renewing a lease"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o664)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)

    def leased(self, now: float | None = None) -> set[str]:
        """Digests with a lease younger than `LEASE_SECONDS`.

        Args:
            now: Seconds since the Unix epoch; None: the present.
        """
        oldest = (time.time() if now is None else now) - LEASE_SECONDS
        return {digest for digest, _, renewed in self.leases() if renewed > oldest}

    @contextmanager
    def lock(self, *, wait: float = 0) -> Iterator[VolumeWriter]:
        """Holds the volume's lock and gives its only writer.

        Args:
            wait: Seconds to wait for another writer.

        Raises:
            VolumeBusy: Another writer holds it.
            VolumeError: The volume cannot be written.
        """
        from modelcache_volume.writer import VolumeWriter  # noqa: PLC0415  writer.py builds on this module

        with ExitStack() as held:
            with disk.space_errors(self.root, "locking it"):
                self._make_folders()
                held.enter_context(writer_lock(self.layout.lock, wait=wait))
            yield VolumeWriter(self)

    def _make_folders(self) -> None:
        layout = self.layout
        for folder in (layout.hub, layout.actives, layout.model_cache, layout.temporary):
            disk.make_folder(folder)
        disk.make_folder(layout.leases, _LEASES_MODE)

    def source_folders(self) -> list[str]:
        """Names of the sources' folders under hub/."""
        return sorted(name for name in _names(self.layout.hub) if is_source_folder(name))

    def _published(self, folder: str = "") -> Iterator[tuple[str, str]]:
        for home in [folder] if folder else self.source_folders():
            for name in sorted(_names(self.layout.manifests(home))):
                if name.endswith(".pb") and is_digest(name.removesuffix(".pb")):
                    yield home, name.removesuffix(".pb")

    def leases(self) -> Iterator[tuple[str, str, float]]:
        """All leases, also old ones: digest, holder, and when it was renewed (seconds since the Unix epoch)."""
        for name in _names(self.layout.leases):
            digest, _, holder = name.partition(".")
            if is_digest(digest) and is_name(holder):
                with suppress(FileNotFoundError):
                    yield digest, holder, self.layout.lease(digest, holder).lstat().st_mtime

    def _read_snapshot(self, folder: str, digest: str) -> Snapshot:
        path = self.layout.manifest(folder, digest)
        manifest = decode_record(manifest_pb2.Manifest, path.read_bytes(), str(path))
        check_format_version(manifest.format_version, str(path))
        problem = manifest_problem(manifest)
        if not problem and manifest.digest != digest:
            problem = f"it is the manifest of {manifest.digest}"
        if problem:
            raise CorruptBlob(f"{path} is damaged: {problem}. Fetch the model again.", path=str(path))
        return Snapshot(self, folder, digest, manifest)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One published snapshot.

    Attributes:
        volume: Where it is.
        folder: Its source's folder under hub/.
        digest: What its content is known by: 64 hex digits.
        manifest: What it contains; not to be changed.
    """

    volume: Volume
    folder: str
    digest: str
    manifest: manifest_pb2.Manifest = field(repr=False)

    @cached_property
    def _files(self) -> dict[str, manifest_pb2.File]:
        return {file.path: file for file in self.manifest.files}

    def file(self, path: str) -> manifest_pb2.File:
        """The file of that path.

        Raises:
            FileNotInSnapshot: There is none.
        """
        try:
            return self._files[path]
        except KeyError:
            raise FileNotInSnapshot(
                f"{self.manifest.source.repo_id} has no file {path[:200]!a} in the snapshot {self.digest[:12]}: "
                "the source lacks it, or the patterns leave it out."
            ) from None

    def blob_path(self, file: manifest_pb2.File) -> Path:
        """Where the file's bytes are on the volume."""
        return self.volume.layout.blob(self.folder, file.sha256.hex())

    def commit_folder(self) -> Path:
        """The folder that shows the snapshot's files under their names, of its newest revision."""
        return self.volume.layout.commit(self.folder, self.manifest.source.commit)

    def open_blob(self, file: manifest_pb2.File) -> int:
        """Opens the file's bytes.

        Returns:
            A descriptor for reading, which the caller closes.

        Raises:
            CorruptBlob: It is missing, no regular file (links are not followed), or has another size.
        """
        path = self.blob_path(file)
        # O_NONBLOCK: opening a FIFO that someone put there would wait for ever; regular files do not mind it.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:
            raise VolumeError(f"{path} cannot be read: run as a user or group that may.") from error
        except OSError as error:
            if error.errno in _NOT_THE_BLOB:
                raise self._corrupt(file, f"it cannot be opened ({error.strerror})") from error
            raise
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
            os.close(descriptor)
            what = f"{status.st_size} bytes long instead of {file.size}"
            raise self._corrupt(file, f"it is {what if stat.S_ISREG(status.st_mode) else 'no regular file'}")
        return descriptor

    def verify(self, progress: Callable[[int], None] | None = None) -> list[Problem]:
        """Reads every byte again and compares it with what was published.

        The page cache is dropped behind the reader, so that checking a volume does not push out what is being served.

        Args:
            progress: Called with the number of bytes read since the last call.

        Returns:
            What is wrong; empty when the snapshot is whole.
        """
        problems = []
        checked: set[bytes] = set()
        for file in self.manifest.files:
            if file.sha256 not in checked:
                checked.add(file.sha256)
                try:
                    self._verify_blob(file, progress)
                except VolumeError as error:
                    problems.append(Problem(file.path, str(error)))
            link = self.commit_folder() / file.path
            if os.path.realpath(link) != os.path.realpath(self.blob_path(file)):
                problems.append(Problem(file.path, f"{link} does not lead to the file's blob. Fetch the model again."))
        return problems

    def _verify_blob(self, file: manifest_pb2.File, progress: Callable[[int], None] | None) -> None:
        hasher = ContentHasher(file.size)
        buffer = memoryview(bytearray(BLOCK_BYTES))
        descriptor = self.open_blob(file)
        try:
            position = 0
            while count := os.preadv(descriptor, [buffer], position):
                hasher.update(buffer[:count])
                os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
                position += count
                if progress:
                    progress(count)
            digests = hasher.result()
        except ChecksumMismatch as error:
            raise self._corrupt(file, str(error)) from error
        except OSError as error:
            raise self._corrupt(file, f"it cannot be read ({error.strerror})") from error
        finally:
            os.close(descriptor)
        for block, (found, published) in enumerate(zip(digests.block_crc32c, file.block_crc32c, strict=True)):
            if found != published:
                raise self._corrupt(file, f"its block {block} (of 4 MiB) has changed", block)
        if digests.sha256 != file.sha256:
            raise self._corrupt(file, "its sha256 is another")

    def _corrupt(self, file: manifest_pb2.File, what: str, block: int | None = None) -> CorruptBlob:
        return CorruptBlob(
            f"{file.path} on the volume is not what was published: {what} ({self.blob_path(file)}). "
            "`modelcache fetch --verify` fetches that file anew.",
            path=file.path,
            sha256=file.sha256.hex(),
            block=block,
        )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
