"""Writing so that a crash loses nothing: fsync, rename, fsync of the folder. All writes of this package pass here."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache_volume.errors import NoSpace, VolumeError

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_MODE = 0o644
FOLDER_MODE = 0o755


@contextmanager
def space_errors(root: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turns "disk full", "quota used up" and "read-only" into sentences.

    Args:
        root: A folder on the volume.
        doing: What is being done, such as "storing model.safetensors".
        needed: Bytes that it needs in all, where known.

    Raises:
        NoSpace: ENOSPC or EDQUOT came up inside.
        VolumeError: The volume cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = _free_bytes(root)
            wanted = f"{needed} bytes are needed, {free} are free" if needed else f"{free} bytes are free"
            limit = "its quota is used up" if error.errno == errno.EDQUOT else "it is full"
            raise NoSpace(
                f"No room on the volume {root} while {doing}: {limit} ({wanted}). Enlarge it (spec.storage.size), keep "
                "fewer old revisions (spec.revisionHistoryLimit, modelcache prune) or select fewer files "
                "(spec.allowPatterns), and run again: what is already there is not fetched again."
            ) from error
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            raise VolumeError(
                f"The volume {root} cannot be written while {doing} ({error.strerror}: {error.filename}): "
                "mount it writable, or run as the user that owns it."
            ) from error
        raise


def _free_bytes(root: Path) -> int:
    try:
        status = os.statvfs(root)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def fsync_folder(folder: Path) -> None:
    """Makes the folder's names (renames, links, removals) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = FOLDER_MODE) -> None:
    """Makes the folder and those above it that are missing, durably, with `mode` whatever the umask is."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode)
        set_mode(folder, mode)
    fsync_folder(folder.parent)


def set_mode(path: Path, mode: int) -> None:
    """Sets the permission bits and keeps the others: fsGroup sets setgid on folders."""
    current = stat.S_IMODE(path.stat().st_mode)
    wanted = current & ~0o777 | mode
    if current != wanted:
        path.chmod(wanted)


def write_durably(path: Path, data: bytes, temporary: Path) -> None:
    """Puts a whole file in place: readers see the old content or the new one, also after a crash.

    Args:
        path: The file.
        data: Its content.
        temporary: A path on the same file system that nobody else uses.
    """
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(descriptor, FILE_MODE)
        os.fsync(descriptor)
    temporary.rename(path)
    fsync_folder(path.parent)


def place_file(source: Path, target: Path) -> None:
    """Moves a finished file to its place: its bytes are on the disk before its new name is.

    The caller makes the new name durable with `fsync_folder`, once for many files.
    """
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, FILE_MODE)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    source.rename(target)


def place_link(link: Path, target: str, temporary: Path) -> bool:
    """Makes `link` a symbolic link to `target`, replacing what link was there.

    Returns:
        Whether anything changed; the caller makes it durable with `fsync_folder`.
    """
    present = read_link(link)
    if present == target:
        return False
    if not present:
        with suppress(FileExistsError):
            link.symlink_to(target)
            return True
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    temporary.rename(link)
    return True


def read_link(link: Path) -> str:
    """Where a symbolic link points to; "" when there is none."""
    try:
        return str(link.readlink())
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if error.errno == errno.EINVAL:  # not a link
            return ""
        raise


def remove_file(path: Path) -> int:
    """Removes a file or link, if it is there, and returns how many bytes it had."""
    try:
        size = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def remove_tree(folder: Path) -> None:
    """Removes a folder with all links and folders in it, if it is there; follows no link."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in (*files, *folders)):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
    with suppress(FileNotFoundError):
        folder.rmdir()


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that has nothing in it; any other stays."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
