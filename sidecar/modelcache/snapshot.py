"""The files of a snapshot as a folder, for tokenizers and for programs that read files themselves."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache.connection import connect
from modelcache.deadline import Deadline
from modelcache.errors import FileNotInSnapshot, IntegrityError
from modelcache.files import select_files, stream_file
from modelcache.volume_lane import VolumeSource, local_volume
from modelcache_volume import validate_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelcache.reader import Source
    from modelcache_volume.v1.manifest_pb2 import File

__all__ = ["download", "snapshot"]

HOME_VARIABLE = "MODELCACHE_HOME"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_ELSEWHERE = f"name another folder with local_dir= or {HOME_VARIABLE}"


def snapshot(
    name: str = "",
    *,
    allow_patterns: Sequence[str] | str | None = None,
    ignore_patterns: Sequence[str] | str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    wait_timeout: float = 600.0,
    timeout: float = 120.0,
) -> Path:
    """Gives the files of what is active now, each checked against its sha256; no hub is asked.

    Files that are there already, and right, are not sent again. A volume that this process can read is used in place of
    the wire, and copied, never linked: who owns the folder could write through a link into what others are served.

    Args:
        name: of the ModelCache, or its repoId.
        allow_patterns: shell wildcards; None: all files.
        ignore_patterns: shell wildcards of files to leave out.
        local_dir: where to put them; None: ``$MODELCACHE_HOME/snapshots/DIGEST`` (``~/.cache/modelcache``).
        address: ``host:port``; default: MODELCACHE_ADDRESS, else ``NAME-weights:9090``.
        token_file: with a bearer token, read anew for each request; default: MODELCACHE_TOKEN_FILE.
        ca_file: authorities to trust for TLS (PEM); default: MODELCACHE_CA_FILE, else public ones.
        wait_timeout: seconds to wait for a server that is not ready yet.
        timeout: seconds that 64 MiB may take, whatever happens to servers meanwhile.

    Returns:
        The folder.

    Raises:
        FileNotInSnapshot: no file matches the patterns.
        IntegrityError: a file differs from what was published; it is not in the folder.
        Unavailable: no server delivered in time.
        OSError: the disk is full, or cannot be written.

    Example:
        >>> tokenizer = AutoTokenizer.from_pretrained(snapshot("bert-base", allow_patterns=["*.json", "*.txt"]))
    """
    with connect(name, address=address, token_file=token_file, ca_file=ca_file, wait_timeout=wait_timeout) as pinned:
        folder = Path(local_dir).expanduser() if local_dir is not None else default_home() / "snapshots" / pinned.digest
        source = local_volume(pinned, os.environ) or pinned
        files = select_files(pinned.manifest, _listed(allow_patterns), _listed(ignore_patterns))
        if not files:
            raise FileNotInSnapshot(
                f"No file of {name or pinned.digest[:12]} matches {allow_patterns=!r}, {ignore_patterns=!r}; "
                f"there are {', '.join(file.path for file in pinned.manifest.files[:8])}."
            )
        for file in files:
            download(source, file, folder, timeout)
    return folder


def download(source: Source, file: File, folder: Path, timeout: float) -> Path:
    """Puts one file of a snapshot in a folder, by rename once it is complete and right; returns its path."""
    target = folder / validate_path(file.path)
    if _is_right(target, file):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        if error.errno in _FORBIDDEN:
            says = f"{target.parent} cannot be written: {error.strerror}. Make it writable, or {_ELSEWHERE}"
            raise OSError(error.errno, says) from error
        raise
    try:
        with os.fdopen(descriptor, "wb") as out:
            copied = isinstance(source, VolumeSource) and source.copy(file, out.fileno())
            if not copied:
                stream_file(source, file, out.write, Deadline(timeout))
        if copied:
            _check(Path(part), file)
        Path(part).chmod(0o644)
        Path(part).replace(target)
    except BaseException as error:
        Path(part).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise OSError(
                error.errno,
                f"{file.path} ({file.size / 2**20:.0f} MiB) does not fit in {target.parent}: {error.strerror}. "
                f"Make room, or {_ELSEWHERE}",
            ) from error
        raise
    return target


def default_home() -> Path:
    """Where files are kept unless said otherwise."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelcache"


def _is_right(path: Path, file: File) -> bool:
    try:
        if path.is_symlink() or path.stat().st_size != file.size:
            return False
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest() == file.sha256
    except FileNotFoundError:
        return False


def _check(copy: Path, file: File) -> None:
    if not _is_right(copy, file):
        raise IntegrityError(
            f"{file.path} on the volume differs from what was published. Run `modelcache fetch --verify` on it.",
            path=file.path,
        )


def _listed(patterns: Sequence[str] | str | None) -> Sequence[str] | None:
    return [patterns] if isinstance(patterns, str) else patterns
