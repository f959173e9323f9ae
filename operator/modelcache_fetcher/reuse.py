"""What need not be fetched because the volume has it: whole snapshots of the same plan, files of other revisions."""

import os
from dataclasses import dataclass

from modelcache_fetcher.pieces import PIECE_BYTES
from modelcache_fetcher.plan import Plan, SourceFile
from modelcache_fetcher.transfer import ContentReader, Received
from modelcache_volume import BadWeights, CorruptBlob, IndexedFile, IndexedTensor, Snapshot, Volume, VolumeWriter
from modelcache_volume.v1 import manifest_pb2


@dataclass(frozen=True, slots=True)
class Known:
    """A file that a published snapshot has.

    Attributes:
        entry: Its entry in that snapshot's manifest.
        indexed: Its tensors as that manifest lists them; None if it has none.
    """

    entry: manifest_pb2.File
    indexed: IndexedFile | None


def published_snapshot(volume: Volume, plan: Plan) -> Snapshot | None:
    """The snapshot that is exactly what the plan would make, if it is published and its blobs are there."""
    for snapshot in volume.snapshots(plan.folder):
        manifest = snapshot.manifest
        same = (manifest.source.repo_id, manifest.source.endpoint) == (plan.repo_id, plan.endpoint)
        commits = {revision.commit for revision in manifest.revisions} | {manifest.source.commit}
        paths = {(file.path, file.size) for file in manifest.files}
        if same and plan.commit in commits and paths == {(file.path, file.size) for file in plan.files}:
            return snapshot if _complete(snapshot) else None
    return None


def known_files(volume: Volume, folder: str) -> dict[tuple[str, ...], Known]:
    """Files of all published snapshots of a source, by every identity that proves equal content."""
    known: dict[tuple[str, ...], Known] = {}
    for snapshot in volume.snapshots(folder):
        indexed = _indexed_files(snapshot.manifest)
        for number, entry in enumerate(snapshot.manifest.files):
            found = Known(entry, indexed.get(number))
            as_listed = SourceFile(
                entry.path, entry.size, entry.etag, git_oid=entry.git_oid, lfs_sha256=entry.lfs_sha256
            )
            known.update((identity, found) for identity in identities(as_listed))
    return known


def identities(file: SourceFile) -> list[tuple[str, ...]]:
    """What names a file's content at its source, strongest first."""
    found: list[tuple[str, ...]] = []
    if file.lfs_sha256:
        found.append(("sha256", file.lfs_sha256))
    if file.git_oid and not file.lfs_sha256:
        found.append(("git", file.git_oid))
    if file.etag:
        found.append(("etag", file.path, str(file.size), file.etag))
    return found


def read_again(writer: VolumeWriter, folder: str, file: SourceFile, sha256: str) -> Received | None:
    """Hash and index a blob that is on the volume but in no usable manifest; None if it is damaged."""
    path = writer.volume.layout.blob(folder, sha256)
    reader = ContentReader(file)
    buffer = memoryview(bytearray(PIECE_BYTES))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        position = 0
        while count := os.preadv(fd, [buffer[: file.size - position]], position) if position < file.size else 0:
            reader.update(buffer[:count])
            os.posix_fadvise(fd, position, count, os.POSIX_FADV_DONTNEED)
            position += count
        received, _ = reader.finish(fd) if position == file.size else (None, "")
    except BadWeights:
        return None
    finally:
        os.close(fd)
    if received is None or received.digests.sha256.hex() != sha256:
        return None
    return received


def _complete(snapshot: Snapshot) -> bool:
    try:
        for file in snapshot.manifest.files:
            os.close(snapshot.open_blob(file))
    except CorruptBlob:
        return False
    return True


def _indexed_files(manifest: manifest_pb2.Manifest) -> dict[int, IndexedFile]:
    tensors: dict[int, list[IndexedTensor]] = {}
    formats: dict[int, manifest_pb2.WeightSet] = {}
    for weights in manifest.weight_sets:
        for number in weights.files:
            formats[number] = weights
            tensors[number] = []
    for tensor in manifest.tensors:
        tensors[tensor.file].append(
            IndexedTensor(
                tensor.name,
                tensor.dtype,
                tuple(tensor.shape),
                tensor.offset,
                tensor.length,
                tuple(tensor.running_crc32c),
                tuple(tensor.strides),
            )
        )
    return {
        number: IndexedFile(formats[number].format, found, dict(formats[number].metadata))
        for number, found in tensors.items()
    }
