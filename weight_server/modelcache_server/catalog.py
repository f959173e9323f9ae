"""Which snapshots this server serves: what is active, what older readers still pin, and nothing of other sources."""

import logging
import re
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from modelcache_server.errors import Reason, RequestError
from modelcache_server.store import ServedFile
from modelcache_volume import CorruptBlob, NoActiveRevision, Snapshot, SnapshotNotFound, Volume, VolumeError
from modelcache_volume.v1 import manifest_pb2

_log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEASE_RENEWAL_SECONDS = 60.0


class Published(Protocol):
    """A snapshot wherever it lies: `modelcache_volume.Snapshot`, or a plain folder."""

    @property
    def folder(self) -> str:
        """The source's folder on the volume."""

    @property
    def digest(self) -> str:
        """64 hex digits."""

    @property
    def manifest(self) -> manifest_pb2.Manifest:
        """What it contains."""

    def open_blob(self, file: manifest_pb2.File) -> int:
        """Open a file's bytes, or raise CorruptBlob."""


class Origin(Protocol):
    """Where snapshots and the active pointer come from."""

    @property
    def root(self) -> Path:
        """The folder that is served."""

    def marker(self) -> Hashable:
        """Something cheap that changes when the active pointer does."""

    def active(self) -> manifest_pb2.Active:
        """The active pointer; raises NoActiveRevision."""

    def snapshot(self, digest: str, folder: str) -> Published:
        """A published snapshot; raises SnapshotNotFound."""

    def present(self, digest: str, folder: str) -> bool:
        """Whether the snapshot is still published."""

    def published(self, folder: str) -> list[manifest_pb2.Manifest]:
        """Manifests of all snapshots of a source."""

    def renew_lease(self, digest: str, holder: str) -> None:
        """Spare a digest from pruning for some minutes."""


class VolumeOrigin:
    """A ModelCache volume, and the name on it that is served."""

    def __init__(self, root: Path, name: str) -> None:
        self._volume = Volume.open(root)
        self._name = name

    @property
    def root(self) -> Path:
        """The volume's root."""
        return self._volume.root

    def marker(self) -> Hashable:
        """Identity and time of the active records."""
        layout = self._volume.layout
        records = [layout.active(self._name)] if self._name else sorted(layout.actives.glob("*.pb"))
        seen = []
        for record in records:
            try:
                status = record.stat()
            except FileNotFoundError:
                continue
            seen.append((record.name, status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(seen)

    def active(self) -> manifest_pb2.Active:
        """The active record of the name; without a name, the only one of the volume."""
        if self._name:
            return self._volume.active(self._name)
        actives = self._volume.actives()
        if len(actives) > 1:
            names = ", ".join(active.name for active in actives)
            raise NoActiveRevision(
                f"{self.root} has several active models: say which one to serve by its name ({names})."
            )
        if not actives:
            raise NoActiveRevision(f"Nothing is active on the volume {self.root} yet: fetch a model into it.")
        return actives[0]

    def snapshot(self, digest: str, folder: str) -> Snapshot:
        """As `Volume.snapshot`."""
        return self._volume.snapshot(digest, folder)

    def present(self, digest: str, folder: str) -> bool:
        """Whether its manifest is there: that is what makes a snapshot exist."""
        return self._volume.layout.manifest(folder, digest).exists()

    def published(self, folder: str) -> list[manifest_pb2.Manifest]:
        """Manifests of one source's snapshots."""
        return [snapshot.manifest for snapshot in self._volume.snapshots(folder)]

    def renew_lease(self, digest: str, holder: str) -> None:
        """As `Volume.renew_lease`."""
        self._volume.renew_lease(digest, holder)


@dataclass(frozen=True, eq=False)
class ServedSnapshot:
    """A snapshot with its files by path."""

    digest: str
    folder: str
    manifest: manifest_pb2.Manifest
    files: dict[str, ServedFile]

    def file(self, path: str) -> ServedFile:
        """A file by its path in the snapshot.

        Raises:
            RequestError: NO_SUCH_FILE.
        """
        try:
            return self.files[path]
        except KeyError:
            raise RequestError(
                Reason.NO_SUCH_FILE, f"Snapshot {self.digest[:12]} has no file {path[:200]!a}; its manifest lists them."
            ) from None


@dataclass(frozen=True, eq=False)
class Announced:
    """What clients are told is active: only what can be read at once."""

    active: manifest_pb2.Active
    snapshot: ServedSnapshot


class Catalog:
    """The snapshots of one origin. Thread safe."""

    def __init__(self, origin: Origin, *, lease_holder: str) -> None:
        self._origin = origin
        self._holder = lease_holder
        self._lock = threading.Lock()
        self._snapshots: dict[str, ServedSnapshot] = {}
        self._own: dict[str, str] = {}  # digest -> folder, of everything that was active while this server ran
        self._renewed: dict[str, float] = {}
        self.announced: Announced | None = None
        self.lease_failures = 0

    @property
    def root(self) -> Path:
        """The folder that is served."""
        return self._origin.root

    def active(self) -> Announced:
        """What is active.

        Raises:
            RequestError: NOT_READY while nothing is.
        """
        announced = self.announced
        if announced is None:
            raise RequestError(
                Reason.NOT_READY,
                "No model is being served yet: it is still fetched or warmed up. Retry.",
                retry_after=1.0,
            )
        return announced

    def load(self, digest: str, folder: str) -> ServedSnapshot:
        """Open a snapshot of this server's own source and remember it.

        Raises:
            SnapshotNotFound, CorruptBlob: as the volume says.
        """
        published = self._origin.snapshot(digest, folder)
        files = {
            file.path: ServedFile(
                file.path,
                file.size,
                file.sha256,
                tuple(file.block_crc32c),
                f"{folder}/{file.sha256.hex()}",
                partial(self._open, published, file),
                partial(self.renew_lease, digest),
            )
            for file in published.manifest.files
        }
        snapshot = ServedSnapshot(digest, folder, published.manifest, files)
        with self._lock:
            self._snapshots[digest] = snapshot
        return snapshot

    def adopt(self, active: manifest_pb2.Active) -> ServedSnapshot:
        """Serve what a pointer names, and what it named before, by digest; nothing is announced yet.

        Raises:
            SnapshotNotFound, CorruptBlob: as the volume says.
        """
        snapshot = self.load(active.digest, active.folder)
        with self._lock:
            self._own[active.digest] = active.folder
            for previous in active.history:
                self._own.setdefault(previous.digest, previous.folder)
        return snapshot

    def announce(self, active: manifest_pb2.Active, snapshot: ServedSnapshot) -> None:
        """Tell clients from now on that this is active."""
        self.announced = Announced(active, snapshot)

    def get(self, digest: str) -> ServedSnapshot:
        """A snapshot by its digest.

        Raises:
            RequestError: REVISION_GONE when it is not on the volume, or is another source's.
        """
        snapshot = self._snapshots.get(digest)
        if snapshot is not None:
            return snapshot
        if not _DIGEST.fullmatch(digest):
            raise RequestError(Reason.INVALID_REQUEST, "A digest is 64 lowercase hexadecimal digits.")
        announced = self.announced
        if announced is None and not self._own:
            self.active()  # raises: a server that does not know its source yet cannot say that a digest is gone
        folder = self._own.get(digest) or (announced.snapshot.folder if announced else "")
        if not folder or not self._origin.present(digest, folder):
            raise _gone(digest)
        try:
            return self.load(digest, folder)
        except SnapshotNotFound:
            raise _gone(digest) from None

    def resolve(self, ref: str) -> ServedSnapshot:
        """A snapshot by a requested ref or a commit of this server's source; "" is what is active.

        Raises:
            RequestError: NOT_READY or UNKNOWN_REF.
        """
        announced = self.active()
        if ref in {"", announced.active.requested, announced.active.commit}:
            return announced.snapshot
        newest: tuple[int, str] | None = None
        for manifest in self._origin.published(announced.snapshot.folder):
            for revision in manifest.revisions:
                if ref in {revision.requested, revision.commit}:
                    newest = max(newest or (0, ""), (revision.published_at, manifest.digest))
        if newest is None:
            raise RequestError(Reason.UNKNOWN_REF, f"{ref[:200]!a} is no revision of {announced.snapshot.folder} here.")
        return self.get(newest[1])

    def kept(self) -> list[tuple[manifest_pb2.Manifest, bool]]:
        """All that `get` gives, each with whether it was active under this server's name; reads manifests."""
        with self._lock:
            own = dict(self._own)
        announced = self.announced
        active = announced.snapshot.folder if announced else ""
        return [
            (manifest, own.get(manifest.digest) == folder)
            for folder in dict.fromkeys([active, *own.values()])
            if folder
            for manifest in self._origin.published(folder)
            if folder == active or own.get(manifest.digest) == folder
        ]

    def renew_lease(self, digest: str) -> None:
        """Note on the volume that a digest is being read; at most once a minute for each."""
        now = time.monotonic()
        with self._lock:
            if now - self._renewed.get(digest, -_LEASE_RENEWAL_SECONDS) < _LEASE_RENEWAL_SECONDS:
                return
            self._renewed[digest] = now
        try:
            self._origin.renew_lease(digest, self._holder)
        except (VolumeError, OSError) as error:
            self.lease_failures += 1
            _log.warning("lease not renewed digest=%s: %s", digest, error)

    def forget_pruned(self) -> None:
        """Drop the snapshots that are no longer on the volume, so that reading them says so."""
        with self._lock:
            known = list(self._snapshots.values())
        for snapshot in known:
            if not self._origin.present(snapshot.digest, snapshot.folder):
                with self._lock:
                    self._snapshots.pop(snapshot.digest, None)
                    self._renewed.pop(snapshot.digest, None)
                _log.info("snapshot pruned digest=%s", snapshot.digest)

    def _open(self, published: Published, file: manifest_pb2.File) -> int:
        try:
            return published.open_blob(file)
        except CorruptBlob:
            # A blob that is missing because its snapshot was pruned is no damage.
            if not self._origin.present(published.digest, published.folder):
                raise _gone(published.digest) from None
            raise


def _gone(digest: str) -> RequestError:
    return RequestError(
        Reason.REVISION_GONE,
        f"Snapshot {digest[:12]} is not on the volume: it was pruned, or belongs to another source. "
        "Ask for the active revision.",
    )
