"""A snapshot's files as the Hugging Face Hub lists them, from the manifest alone. Pure.

What the source did not say is derived, never guessed: a file without a Git object id (of a bucket or folder) is listed
as a Git LFS file, whose id is its SHA-256 and whose pointer follows from that; a folder's id is that of the Git tree of
the files listed here, which is not upstream's where patterns leave files out.

Pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md. Objects:
https://git-scm.com/book/en/v2/Git-Internals-Git-Objects.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from modelcache_server.catalog import ServedSnapshot
from modelcache_server.store import ServedFile
from modelcache_volume.v1 import manifest_pb2

Entry = dict[str, Any]
"""What becomes a JSON object."""


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub knows it.

    Attributes:
        served: where its bytes are.
        oid: Git object id (40 hex) of the file, or of the pointer that stands for it.
        lfs_sha256: SHA-256 (64 hex) of a file kept by Git LFS, else empty.
    """

    served: ServedFile
    oid: str
    lfs_sha256: str

    @property
    def etag(self) -> str:
        """What clients name their cached file after."""
        return self.lfs_sha256 or self.oid

    def entry(self) -> Entry:
        """Its place in a tree."""
        entry: Entry = {"type": "file", "path": self.served.path, "size": self.served.size, "oid": self.oid}
        if self.lfs_sha256:
            pointer = len(_pointer(self.lfs_sha256, self.served.size))
            entry["lfs"] = {"oid": self.lfs_sha256, "size": self.served.size, "pointerSize": pointer}
        return entry

    def sibling(self, *, blobs: bool) -> Entry:
        """Its place in a model's info."""
        sibling: Entry = {"rfilename": self.served.path}
        if blobs:
            sibling |= {"size": self.served.size, "blobId": self.oid}
            if self.lfs_sha256:
                pointer = len(_pointer(self.lfs_sha256, self.served.size))
                sibling["lfs"] = {"sha256": self.lfs_sha256, "size": self.served.size, "pointerSize": pointer}
        return sibling


@dataclass
class _Folder:
    folders: "dict[str, _Folder]" = field(default_factory=dict)
    files: dict[str, HubFile] = field(default_factory=dict)


class HubListing:
    """All files and folders of a snapshot."""

    def __init__(self, snapshot: ServedSnapshot) -> None:
        self.files = {file.path: _hub_file(file, snapshot.files[file.path]) for file in snapshot.manifest.files}
        self._entries: dict[str, Entry] = {}
        self._inside: dict[str, list[str]] = {}
        top = _Folder()
        for path, file in self.files.items():
            *parents, name = path.split("/")
            folder = top
            for parent in parents:
                folder = folder.folders.setdefault(parent, _Folder())
            folder.files[name] = file
        self._enter(top, "")

    def entry(self, path: str) -> Entry | None:
        """A file or folder; None if there is none of that path."""
        return self._entries.get(path)

    def tree(self, folder: str, *, recursive: bool) -> list[Entry] | None:
        """What is in a folder ("" for the top), sorted by path; None if there is no such folder.

        Args:
            folder: its path, without a slash at the end.
            recursive: with what is in its folders.
        """
        inside = self._inside.get(folder)
        if inside is None:
            return None
        entries = []
        for path in inside:
            entries.append(self._entries[path])
            if recursive and path in self._inside:
                entries.extend(self.tree(path, recursive=True) or ())
        return entries

    def _enter(self, folder: _Folder, path: str) -> str:
        """Note a folder and what is in it; its Git object id."""
        prefix = f"{path}/" if path else ""
        objects = []
        for name, inner in folder.folders.items():
            oid = self._enter(inner, prefix + name)
            self._entries[prefix + name] = {"type": "directory", "path": prefix + name, "size": 0, "oid": oid}
            objects.append((b"40000", name, oid))
        for name, file in folder.files.items():
            self._entries[prefix + name] = file.entry()
            objects.append((b"100644", name, file.oid))
        self._inside[path] = sorted(prefix + name for _, name, _ in objects)
        return _tree_oid(objects)


def _hub_file(file: manifest_pb2.File, served: ServedFile) -> HubFile:
    if file.git_oid and not file.lfs_sha256:
        return HubFile(served, file.git_oid, "")
    sha256 = file.sha256.hex()
    return HubFile(served, file.git_oid or _git_oid(b"blob", _pointer(sha256, file.size)), sha256)


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _tree_oid(objects: Iterable[tuple[bytes, str, str]]) -> str:
    # Git sorts a folder as if its name ended in a slash.
    ordered = sorted(objects, key=lambda each: each[1].encode() + (b"/" if each[0] == b"40000" else b""))
    content = b"".join(mode + b" " + name.encode() + b"\0" + bytes.fromhex(oid) for mode, name, oid in ordered)
    return _git_oid(b"tree", content)


def _git_oid(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind, len(content)) + content, usedforsecurity=False).hexdigest()
