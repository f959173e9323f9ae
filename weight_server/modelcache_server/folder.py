"""A plain folder of weights, served as if it were a volume with one snapshot that never changes."""

import os
import stat
from collections.abc import Hashable
from pathlib import Path

from modelcache_volume import (
    BLOCK_BYTES,
    ContentHasher,
    CorruptBlob,
    NotAVolume,
    SafetensorsIndexer,
    SnapshotNotFound,
    build_manifest,
    is_index_file,
)
from modelcache_volume.v1 import manifest_pb2

_SAFETENSORS = ".safetensors"


class FolderOrigin:
    """Reads the whole folder once, to know its checksums; a file that changes later is served no more.

    Hidden files are left out, and so are links that lead out of the folder (but into `blobs` of a Hugging Face cache).

    Raises:
        NotAVolume: There is nothing to serve.
        BadWeights: A weight file is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.folder = "folder"
        self._paths = dict(sorted(self._find()))
        if not any(path.endswith(_SAFETENSORS) for path in self._paths):
            raise NotAVolume(
                f"{root} has nothing to serve: it is neither a ModelCache volume nor a folder with .safetensors files."
            )
        weights, index_files, files = {}, {}, []
        for path, location in self._paths.items():
            file, indexer = self._read(path, location)
            files.append(file)
            if indexer is not None:
                weights[path] = indexer.finish()
            elif is_index_file(path):
                index_files[path] = location.read_bytes()
        source = manifest_pb2.Source(repo_id=f"file://{self.root}", commit="0" * 40)
        self.manifest = build_manifest(source, files, weights=weights, index_files=index_files)
        self.digest = self.manifest.digest
        self.manifest.source.commit = self.digest[:40]

    def marker(self) -> Hashable:
        """Nothing ever changes here."""
        return self.digest

    def active(self) -> manifest_pb2.Active:
        """The only snapshot."""
        return manifest_pb2.Active(
            format_version=self.manifest.format_version,
            name=self.root.name,
            folder=self.folder,
            commit=self.manifest.source.commit,
            digest=self.digest,
            generation=1,
        )

    def snapshot(self, digest: str, folder: str) -> "FolderOrigin":
        """The only snapshot, which this is."""
        if not self.present(digest, folder):
            raise SnapshotNotFound(f"The folder {self.root} is served as {self.digest}, not as {digest}.")
        return self

    def present(self, digest: str, folder: str) -> bool:
        """Whether it is the only snapshot."""
        return (digest, folder) == (self.digest, self.folder)

    def published(self, folder: str) -> list[manifest_pb2.Manifest]:
        """The only manifest."""
        return [self.manifest] if folder == self.folder else []

    def renew_lease(self, digest: str, holder: str) -> None:
        """Nothing prunes a plain folder."""

    def open_blob(self, file: manifest_pb2.File) -> int:
        """Open a file's bytes; CorruptBlob when it is not the file that was read at the start."""
        try:
            descriptor = os.open(self._paths[file.path], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptBlob(f"{file.path} cannot be opened any more: {error.strerror}.", path=file.path) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
            os.close(descriptor)
            raise CorruptBlob(
                f"{file.path} was changed while it was being served. Start the server anew.", path=file.path
            )
        return descriptor

    def _find(self) -> list[tuple[str, Path]]:
        """(path in the folder, the regular file it stands for)."""
        inside = [self.root]
        if self.root.parent.name == "snapshots":
            inside.append(self.root.parent.parent / "blobs")
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                location = Path(os.path.realpath(path))
                if not name.startswith(".") and location.is_file() and any(map(location.is_relative_to, inside)):
                    found.append((path.relative_to(self.root).as_posix(), location))
        return found

    @staticmethod
    def _read(path: str, location: Path) -> tuple[manifest_pb2.File, SafetensorsIndexer | None]:
        size = location.stat().st_size
        hasher = ContentHasher(size)
        indexer = SafetensorsIndexer(path, size) if path.endswith(_SAFETENSORS) else None
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with location.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                if indexer is not None:
                    indexer.update(buffer[:count])
        digests = hasher.result()
        entry = manifest_pb2.File(
            path=path,
            size=size,
            sha256=digests.sha256,
            block_crc32c=digests.block_crc32c,
            verification=manifest_pb2.VERIFICATION_LOCAL_STAT,
        )
        return entry, indexer
