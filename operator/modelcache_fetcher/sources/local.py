"""Folders of this machine: plain ones, and repos in the Hugging Face cache layout.

The cache's layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache) keeps a revision as symlinks from
``models--ORG--NAME/snapshots/COMMIT`` into ``models--ORG--NAME/blobs``. Symlinks that lead anywhere else are refused.
"""

import os
import stat
from pathlib import Path

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError, SourceChangedError
from modelcache_fetcher.plan import Listing, SourceFile, listing_commit
from modelcache_fetcher.sources import LocalLocation
from modelcache_volume.v1.manifest_pb2 import VERIFICATION_LOCAL_STAT


class LocalSource:
    """A folder; its revision is the digest of its listing."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._identities: dict[str, LocalLocation] = {}

    def list_files(self, revision: str | None) -> Listing:
        """List the folder's files, below all subfolders, in the order of their paths."""
        if revision:
            raise FetchError(Reason.INVALID_SOURCE, f"A folder has no revisions; remove revision: {revision}.")
        root, roots = self._snapshot_root()
        found: list[SourceFile] = []
        self._identities.clear()
        self._walk(root, "", roots, found)
        return Listing("", listing_commit(found), tuple(found))

    def examine(self, file: SourceFile) -> SourceFile:
        """The listing says all there is to know."""
        return file

    def locate(self, file: SourceFile, commit: str) -> LocalLocation:
        """The real path of a listed file."""
        del commit
        return self._identities[file.path]

    def renew(self) -> None:
        """A folder needs no credentials."""

    def _snapshot_root(self) -> tuple[Path, tuple[Path, ...]]:
        """The folder to walk, and the folders that symlinks below it may lead to."""
        try:
            root = self._folder.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError):
            raise FetchError(Reason.NOT_FOUND, f"The folder {self._folder} does not exist.") from None
        except (OSError, RuntimeError) as error:
            raise FetchError(Reason.INVALID_SOURCE, f"The folder {self._folder} cannot be read: {error}.") from None
        if not root.is_dir():
            raise FetchError(
                Reason.INVALID_SOURCE, f"{self._folder} is no folder; name the folder that holds the model."
            )
        if (root / "snapshots").is_dir() and (root / "blobs").is_dir():
            root = self._cached_commit(root)
        if root.parent.name == "snapshots" and (blobs := root.parent.parent / "blobs").is_dir():
            return root, (root, blobs.resolve())
        return root, (root,)

    def _cached_commit(self, repo: Path) -> Path:
        """The snapshot of a cached repo that refs/main names, or its only one."""
        snapshots = sorted(path for path in (repo / "snapshots").iterdir() if path.is_dir())
        main = repo / "refs" / "main"
        commit = main.read_text(encoding="ascii", errors="replace").strip() if main.is_file() else ""
        for snapshot in snapshots:
            if snapshot.name == commit or len(snapshots) == 1:
                return snapshot
        raise FetchError(
            Reason.NOT_FOUND,
            f"{self._folder} is a Hugging Face cache of {len(snapshots)} snapshots without refs/main; name one, such "
            f"as file://{self._folder}/snapshots/COMMIT.",
        )

    def _walk(self, folder: Path, prefix: str, roots: tuple[Path, ...], found: list[SourceFile]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise FetchError(
                Reason.INVALID_SOURCE, f"The folder {folder} cannot be listed: {error.strerror}."
            ) from None
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                self._walk(Path(entry.path), f"{path}/", roots, found)
                continue
            real = _real_path(Path(entry.path), path, roots) if entry.is_symlink() else entry.path
            found.append(self._source_file(real, path))

    def _source_file(self, real: str, path: str) -> SourceFile:
        try:
            info = Path(real).lstat()
        except FileNotFoundError:
            raise SourceChangedError(path, f"{path} disappeared while the folder was listed.") from None
        if not stat.S_ISREG(info.st_mode):
            raise FetchError(
                Reason.INVALID_SOURCE,
                f"{path} is no regular file (a device, pipe, socket or linked folder); remove it from {self._folder}.",
                path=path,
            )
        self._identities[path] = LocalLocation(real, LocalLocation.identity_of(info))
        # A file that was replaced can have its predecessor's size and modification time (cp -p, rsync -t), not its
        # inode and change time as well.
        etag = f"{info.st_size:x}-{info.st_mtime_ns:x}-{info.st_ctime_ns:x}-{info.st_ino:x}"
        return SourceFile(path, info.st_size, etag, version=f"{info.st_ino:x}", unchecked=VERIFICATION_LOCAL_STAT)


def _real_path(link: Path, path: str, roots: tuple[Path, ...]) -> str:
    try:
        real = link.resolve(strict=True)
    except (OSError, RuntimeError):
        raise FetchError(
            Reason.INVALID_SOURCE, f"{path} is a symlink that leads nowhere; remove or repair it.", path=path
        ) from None
    if not any(real.is_relative_to(root) for root in roots):
        raise FetchError(
            Reason.INVALID_SOURCE,
            f"{path} is a symlink that leaves the folder; replace it by the file that it points to.",
            path=path,
        )
    return str(real)
