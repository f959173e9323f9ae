"""The one writer of a volume: stores blobs, publishes snapshots, makes them active, prunes; a crash loses nothing."""

from __future__ import annotations

import itertools
import logging
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache_volume import disk
from modelcache_volume.errors import BadManifest, CorruptBlob, NoActiveRevision, SnapshotNotFound
from modelcache_volume.layout import FORMAT_VERSION, LEASE_SECONDS, bucket_name
from modelcache_volume.paths import validate_path
from modelcache_volume.prune import decide, protected
from modelcache_volume.records import check_format_version, encode_record, manifest_problem
from modelcache_volume.v1 import manifest_pb2

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from modelcache_volume.volume import Snapshot, Volume

from modelcache_volume.sweep import carry_out, read_state, remove_empty

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What pruning removed.

    Attributes:
        digests: Snapshots that are no more.
        bytes: Room that was freed, in bytes.
    """

    digests: tuple[str, ...]
    bytes: int


class VolumeWriter:
    """Writes to a volume while its lock is held; `Volume.lock` gives one.

    `blob_exists`, `incoming` and `adopt` may be called from several threads at once, the rest from one.

    Args:
        volume: The locked volume.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self._layout = volume.layout
        self._counter = itertools.count()
        self._in_use: set[tuple[str, str]] = set()
        self._folders: set[str] = set()
        for left in self._layout.temporary.iterdir():  # of a writer that died: the lock is ours
            left.unlink()

    def blob_exists(self, folder: str, sha256_hex: str, size: int) -> bool:
        """Whether the blob is already there, with that size in bytes; pruning by this writer then spares it."""
        try:
            status = os.lstat(self._layout.blob(folder, sha256_hex))
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        self._in_use.add((folder, sha256_hex))
        return True

    def incoming(self, folder: str, key: str) -> Path:
        """Path of the partial file of a download; it survives this process, for the next one to continue.

        Args:
            folder: The source's.
            key: The caller's hash of what identifies the content, such as path, etag and size.
        """
        path = self._layout.part(folder, key)
        self._folders.add(folder)
        with disk.space_errors(self.volume.root, "preparing a download"):
            disk.make_folder(path.parent)
        return path

    def adopt(self, folder: str, part: Path, sha256_hex: str) -> None:
        """Makes a complete, verified partial file a blob.

        Its bytes are on the disk when this returns; its name is once a snapshot with it is published.

        Args:
            folder: The source's.
            part: The file, on the same volume.
            sha256_hex: Of its content.
        """
        target = self._layout.blob(folder, sha256_hex)
        self._in_use.add((folder, sha256_hex))
        self._folders.add(folder)
        with disk.space_errors(self.volume.root, "storing a blob"):
            disk.make_folder(target.parent)
            disk.place_file(part, target)

    def discard(self, folder: str, sha256_hex: str) -> None:
        """Removes a blob that was found damaged, so that the next fetch brings it again."""
        with disk.space_errors(self.volume.root, "discarding a blob"):
            disk.remove_file(self._layout.blob(folder, sha256_hex))

    def publish(self, folder: str, manifest: manifest_pb2.Manifest) -> Snapshot:
        """Makes a snapshot exist.

        Content that is already published under another revision stays one snapshot, which then lists both.

        Args:
            folder: The source's.
            manifest: As `build_manifest` makes it; `revisions` is filled in here.

        Returns:
            The snapshot, as it can be read from now on.

        Raises:
            BadManifest: The manifest contradicts itself, or a blob is missing or has another size.
            NoSpace: The volume is full; what was published before is untouched.
        """
        self._check(folder, manifest)
        manifest = self._with_revisions(folder, manifest)
        source = manifest.source
        with disk.space_errors(self.volume.root, f"publishing {source.repo_id}"):
            disk.make_folder(self._layout.blobs(folder))
            disk.fsync_folder(self._layout.blobs(folder))
            self._link(folder, manifest, source.commit)
            disk.make_folder(self._layout.manifests(folder))
            path = self._layout.manifest(folder, manifest.digest)
            disk.write_durably(path, encode_record(manifest), self._temporary())
            self._write_ref(folder, source.requested, source.commit)
        return self.volume.snapshot(manifest.digest, folder)

    def activate(self, name: str, snapshot: Snapshot, *, requested: str, history_limit: int = 1) -> manifest_pb2.Active:
        """Makes a snapshot what is served under `name`. Readers see the old record or the new one.

        Args:
            name: Of the ModelCache.
            snapshot: A published one.
            requested: What was asked for: a branch, tag or commit; "" for buckets.
            history_limit: How many earlier ones pruning spares.

        Returns:
            The record; its generation grows by one, unless digest, commit and `requested` are what they were.

        Raises:
            SnapshotNotFound: The snapshot was pruned meanwhile.
            NoSpace: The volume is full; what was active still is.
        """
        snapshot = self.volume.snapshot(snapshot.digest, snapshot.folder)
        source = snapshot.manifest.source
        active = manifest_pb2.Active(
            format_version=FORMAT_VERSION,
            name=name,
            folder=snapshot.folder,
            requested=requested,
            commit=source.commit,
            digest=snapshot.digest,
            generation=1,
            activated_at=int(time.time()),
            history_limit=history_limit,
        )
        before = self._active_before(name)
        if before:
            _continue_from(before, active)
        with disk.space_errors(self.volume.root, f"activating {name}"):
            self._link(snapshot.folder, snapshot.manifest, source.commit)
            self._write_ref(snapshot.folder, requested, source.commit)
            self._link_bucket(snapshot, source.commit)
            if before != active:
                disk.write_durably(self._layout.active(name), encode_record(active), self._temporary())
        return active

    def deactivate(self, name: str) -> None:
        """Stops serving `name`; its snapshots stay until they are pruned. Does nothing if nothing is active."""
        with disk.space_errors(self.volume.root, f"deactivating {name}"):
            disk.remove_file(self._layout.active(name))
            disk.fsync_folder(self._layout.actives)
            self._link_buckets()

    def prune(
        self,
        *,
        keep: Collection[str] = (),
        now: float | None = None,
        keep_incoming: Mapping[str, Collection[str]] | None = None,
    ) -> Pruned:
        """Removes snapshots that nobody needs, and what interrupted runs left behind.

        Spared are the active ones, the first `history_limit` of their history, leased ones and `keep`; blobs that these
        share; and for a week what an interrupted fetch can continue from.

        Args:
            keep: Digests to spare as well.
            now: Seconds since the Unix epoch; None: the present.
            keep_incoming: By source folder, the keys of partial files that are still wanted: others of that folder go
                at once, and so do blobs there that no snapshot has and that this writer did not touch.

        Raises:
            CorruptBlob: An active record, or the manifest of a snapshot to be spared, is damaged: nothing is removed.
            NewerFormat: A newer program wrote one of them: nothing is removed.
        """
        now = time.time() if now is None else now
        actives = self.volume.actives()
        stay = protected(actives, {*keep, *self.volume.leased(now)})
        removals = {}
        for folder in self.volume.source_folders():
            in_use = {sha256 for owner, sha256 in self._in_use if owner == folder}
            wanted = keep_incoming.get(folder) if keep_incoming is not None else None
            removals[folder] = decide(
                read_state(self.volume, folder, stay), stay, now, in_use=in_use, keep_incoming=wanted
            )
        freed = 0
        with disk.space_errors(self.volume.root, "pruning"):
            for folder, removal in removals.items():
                freed += carry_out(self._layout, folder, removal)
                if folder not in self._folders:
                    remove_empty(self._layout, folder)
            self._link_buckets()
            for digest, holder, renewed in self.volume.leases():
                if now - renewed > LEASE_SECONDS:
                    disk.remove_file(self._layout.lease(digest, holder))
        digests = {digest for removal in removals.values() for digest in removal.manifests}
        return Pruned(tuple(sorted(digests)), freed)

    def _temporary(self) -> Path:
        return self._layout.temporary / str(next(self._counter))

    def _check(self, folder: str, manifest: manifest_pb2.Manifest) -> None:
        check_format_version(manifest.format_version, "The manifest")
        problem = manifest_problem(manifest)
        if problem:
            raise BadManifest(f"The manifest of {manifest.source.repo_id} is not published: {problem}.")
        self._layout.commit(folder, manifest.source.commit)
        if manifest.source.requested:
            validate_path(manifest.source.requested)
        for file in manifest.files:
            if not self.blob_exists(folder, file.sha256.hex(), file.size):
                raise BadManifest(
                    f"The manifest of {manifest.source.repo_id} is not published: the blob of {file.path} "
                    f"({self._layout.blob(folder, file.sha256.hex())}, {file.size} bytes) is missing. Fetch it again."
                )

    def _with_revisions(self, folder: str, manifest: manifest_pb2.Manifest) -> manifest_pb2.Manifest:
        """A copy that also lists the revisions under which its content was published before."""
        merged = manifest_pb2.Manifest()
        merged.CopyFrom(manifest)
        del merged.revisions[:]
        source = manifest.source
        try:
            before = list(self.volume.snapshot(manifest.digest, folder).manifest.revisions)
        except SnapshotNotFound:
            before = []
        except CorruptBlob as error:
            _LOG.warning("%s It is replaced.", error)
            before = []
        same = [old for old in before if (old.requested, old.commit) == (source.requested, source.commit)]
        now = manifest_pb2.Revision(requested=source.requested, commit=source.commit, published_at=int(time.time()))
        merged.revisions.extend(old for old in before if old not in same)
        merged.revisions.append(same[-1] if same and before[-1] == same[-1] else now)
        return merged

    def _link(self, folder: str, manifest: manifest_pb2.Manifest, commit: str) -> None:
        """Shows the files under their names in snapshots/COMMIT, durably; changes nothing that is right already."""
        top = self._layout.commit(folder, commit)
        in_the_way = top.is_dir()
        made: set[Path] = set()
        changed: set[Path] = set()
        for file in manifest.files:
            link = top / file.path
            if in_the_way:
                self._clear_way(top, link)
            if link.parent not in made:
                disk.make_folder(link.parent)
                made.add(link.parent)
            up = "../" * (2 + file.path.count("/"))
            if disk.place_link(link, f"{up}blobs/{file.sha256.hex()}", self._temporary()):
                changed.add(link.parent)
        disk.make_folder(top)
        for parent in changed:
            disk.fsync_folder(parent)

    def _clear_way(self, top: Path, path: Path) -> None:
        """Removes what another selection of the same source left where `path` is to be: a folder, or files above it."""
        if path.is_dir() and not path.is_symlink():
            disk.remove_tree(path)
        parent = path.parent
        while parent not in (top, top.parent):
            if parent.is_symlink() or parent.is_file():
                disk.remove_file(parent)
            parent = parent.parent

    def _write_ref(self, folder: str, ref: str, commit: str) -> None:
        if ref in {"", commit}:
            return
        top = self._layout.refs(folder)
        path = top / validate_path(ref)
        if path.is_file() and path.read_bytes() == commit.encode():
            return
        self._clear_way(top, path)
        disk.make_folder(path.parent)
        disk.write_durably(path, commit.encode(), self._temporary())

    def _active_before(self, name: str) -> manifest_pb2.Active | None:
        try:
            return self.volume.active(name)
        except NoActiveRevision:
            return None
        except CorruptBlob as error:
            _LOG.warning("%s It is replaced.", error)
            return None

    def _link_bucket(self, snapshot: Snapshot, commit: str) -> str:
        """Makes model_cache/BUCKET lead to a commit of the snapshot; returns the link's name, "" if it has none."""
        name = bucket_name(snapshot.manifest.source.repo_id)
        if name:
            target = os.path.relpath(self._layout.commit(snapshot.folder, commit), self._layout.model_cache)
            if disk.place_link(self._layout.model_cache / name, target, self._temporary()):
                disk.fsync_folder(self._layout.model_cache)
        return name

    def _link_buckets(self) -> None:
        """Makes model_cache/ show what is active, and nothing else."""
        wanted = set()
        for active in sorted(self.volume.actives(), key=lambda active: active.activated_at):
            with suppress(SnapshotNotFound):
                wanted.add(self._link_bucket(self.volume.snapshot(active.digest, active.folder), active.commit))
        for link in self._layout.model_cache.iterdir():
            if link.name not in wanted:
                disk.remove_file(link)


def _continue_from(before: manifest_pb2.Active, active: manifest_pb2.Active) -> None:
    """Fills in generation and history of a record from the one that it replaces."""
    same_content = (before.folder, before.digest) == (active.folder, active.digest)
    unchanged = same_content and (before.commit, before.requested) == (active.commit, active.requested)
    active.generation = before.generation if unchanged else before.generation + 1
    if unchanged:
        active.activated_at = before.activated_at
    history = list(before.history)
    if not same_content:
        previous = manifest_pb2.Previous(
            folder=before.folder, requested=before.requested, commit=before.commit, digest=before.digest
        )
        history.insert(0, previous)
    seen = {(active.folder, active.digest)}
    for entry in history:
        if (entry.folder, entry.digest) not in seen and len(active.history) < active.history_limit:
            seen.add((entry.folder, entry.digest))
            active.history.append(entry)
