"""What a source has and what is fetched of it: plain data and pure decisions, no I/O."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.patterns import first_match, nearest_names
from modelcache_fetcher.weights_choice import left_out
from modelcache_volume import InvalidPath, refuse_clashes, validate_path
from modelcache_volume.v1.manifest_pb2 import VERIFICATION_NONE, Verification


@dataclass(frozen=True, slots=True)
class Checksum:
    """A digest that the source states for a whole file.

    Attributes:
        algorithm: "sha256" or one that ``modelcache_volume.ContentHasher`` computes.
        value: The digest's bytes (big-endian for CRCs).
        kind: How the manifest records a file that was compared with it.
    """

    algorithm: str
    value: bytes
    kind: Verification.ValueType

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value.hex()}"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file as the source lists it.

    Attributes:
        path: Relative to the repo or prefix.
        size: In bytes.
        etag: The source's name for this state of the content; two equal (path, etag, size) are the same bytes.
        version: What the source needs to address exactly this state (object version, generation), or "".
        checksums: Strongest first; empty if the source states none that can be used.
        git_oid: Git object id (40 hex), for Git sources.
        lfs_sha256: SHA-256 (64 hex) of LFS files.
        unchecked: How the manifest records the file if there are no checksums.
        unchecked_note: What the source states that cannot be compared, for the record.
    """

    path: str
    size: int
    etag: str
    version: str = ""
    checksums: tuple[Checksum, ...] = ()
    git_oid: str = ""
    lfs_sha256: str = ""
    unchecked: Verification.ValueType = VERIFICATION_NONE
    unchecked_note: str = ""

    @property
    def key(self) -> str:
        """Names the resumable partial file: equal for equal (path, etag, size) only."""
        identity = f"{self.path}\0{self.etag}\0{self.version}\0{self.size}"
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of one revision.

    Attributes:
        requested: The branch, tag or commit asked for; "" for buckets and folders.
        commit: 40 hex digits.
        files: In the source's order.
    """

    requested: str
    commit: str
    files: tuple[SourceFile, ...]


def listing_commit(files: Iterable[SourceFile]) -> str:
    """The revision of a bucket or folder: 40 hex digits that change with any file's path, size or etag."""
    lines = hashlib.sha256()
    for file in sorted(files, key=lambda each: os.fsencode(each.path)):
        lines.update(os.fsencode(f"{file.path}\0{file.size}\0{file.etag}\n"))
    return lines.hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to fetch, and why."""

    file: SourceFile
    why: str

    @property
    def path(self) -> str:
        """Relative to the repo or prefix."""
        return self.file.path

    @property
    def size(self) -> int:
        """In bytes."""
        return self.file.size


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that is not fetched, and why."""

    path: str
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fetch would bring.

    Attributes:
        repo_id: The source in canonical form.
        endpoint: The hub or bucket service; "" for the public default.
        folder: The source's folder under hub/ on the volume.
        requested: The branch, tag or commit asked for; "" for buckets and folders.
        commit: What it stands for now (40 hex digits).
        allow_patterns: As given.
        ignore_patterns: As given.
        files: Sorted by path.
        skipped: Sorted by path.
    """

    repo_id: str
    endpoint: str
    folder: str
    requested: str
    commit: str
    allow_patterns: tuple[str, ...]
    ignore_patterns: tuple[str, ...]
    files: tuple[PlannedFile, ...]
    skipped: tuple[SkippedFile, ...]

    @property
    def total_bytes(self) -> int:
        """The sum of the files' sizes."""
        return sum(planned.size for planned in self.files)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, every file with its reason."""
        return {
            "repoId": self.repo_id,
            "endpoint": self.endpoint,
            "requested": self.requested,
            "commit": self.commit,
            "totalBytes": self.total_bytes,
            "files": [{"path": f.path, "size": f.size, "why": f.why} for f in self.files],
            "skipped": [{"path": f.path, "size": f.size, "why": f.why} for f in self.skipped],
        }


def select(
    listing: Listing, allow: Sequence[str] | None, ignore: Sequence[str] | None
) -> tuple[tuple[PlannedFile, ...], tuple[SkippedFile, ...]]:
    """Decide which files of a listing are fetched, and say of each why it is in or out.

    Args:
        listing: What the source has.
        allow: Patterns of which one must match; None or empty: one set of weights, and all that is no weights.
        ignore: Patterns of which none may match.

    Raises:
        FetchError: NotFound if nothing is left, InvalidSource if a selected path is unsafe on a volume.
    """
    files: list[PlannedFile] = []
    skipped: list[SkippedFile] = []
    remaining = [file.path for file in listing.files if first_match(file.path, ignore or ()) is None]
    needless = {} if allow else left_out(remaining)
    for file in sorted(listing.files, key=lambda each: each.path.encode("utf-8", "surrogateescape")):
        allowed = first_match(file.path, allow) if allow else None
        ignored = first_match(file.path, ignore or ())
        if allow and allowed is None:
            skipped.append(SkippedFile(file.path, file.size, "matches none of allowPatterns"))
        elif ignored is not None:
            skipped.append(SkippedFile(file.path, file.size, f"matches ignorePatterns {ignored!r}"))
        elif file.path in needless:
            skipped.append(SkippedFile(file.path, file.size, needless[file.path]))
        else:
            why = f"matches allowPatterns {allowed!r}" if allowed is not None else "no allowPatterns are given"
            files.append(PlannedFile(file, why))
    if not files:
        raise _nothing_left(listing, list(allow or ()), list(ignore or ()))
    _refuse_unsafe([planned.path for planned in files])
    return tuple(files), tuple(skipped)


def _nothing_left(listing: Listing, allow: list[str], ignore: list[str]) -> FetchError:
    if not listing.files:
        return FetchError(Reason.NOT_FOUND, "The source has no files at all; check repoId and revision.")
    paths = [file.path for file in listing.files]
    if not allow:
        message = f"ignorePatterns {ignore} leave out all {len(paths)} files; take away the pattern that is too wide."
    else:
        near = ", ".join(map(repr, nearest_names(paths, allow)))
        message = f"None of the {len(paths)} files is left by allowPatterns {allow}"
        message += f" and ignorePatterns {ignore}" if ignore else ""
        message += f". Patterns are case-sensitive and apply to the whole path; the nearest names are: {near}."
    return FetchError(Reason.NOT_FOUND, message)


def _refuse_unsafe(paths: list[str]) -> None:
    try:
        for path in paths:
            validate_path(path)
        refuse_clashes(paths)
    except InvalidPath as error:
        raise FetchError(
            Reason.INVALID_SOURCE,
            f"The source names a file that cannot be stored safely: {error}",
        ) from error
