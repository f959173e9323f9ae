"""Where everything lies on a volume. Pure: names and paths only.

FORMAT                          the layout's version
.lock  .tmp/                    the writer's lock; files about to be renamed into place
hub/FOLDER/blobs/SHA256         the bytes of files, named by content
hub/FOLDER/refs/REF             the commit that a branch or tag stood for
hub/FOLDER/snapshots/COMMIT/…   relative links into blobs/, as in the Hugging Face cache
hub/FOLDER/manifests/DIGEST.pb  what makes a snapshot exist; DIGEST.pruned while its blobs are being removed
hub/FOLDER/incoming/KEY.part    files being downloaded
active/NAME.pb                  what is served for NAME
leases/DIGEST.HOLDER            touched by those who read DIGEST
model_cache/BUCKET              link to the active snapshot of a bucket
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache_volume.errors import InvalidPath, SnapshotNotFound

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_VERSION = 1
"""Version of the layout and of the records that this package writes."""

LEASE_SECONDS = 600
"""A lease that was not renewed for so long is no more."""

_HEX64 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9_.-]{1,96}/)?[A-Za-z0-9_.-]{1,96}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_BUCKET_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs", "file": "file"}


@dataclass(frozen=True)
class Layout:
    """Paths of one volume.

    Attributes:
        root: The volume's top folder.
    """

    root: Path

    @property
    def format(self) -> Path:
        """File with the layout's version."""
        return self.root / "FORMAT"

    @property
    def lock(self) -> Path:
        """File that a writer locks."""
        return self.root / ".lock"

    @property
    def temporary(self) -> Path:
        """Folder of files about to be renamed into place."""
        return self.root / ".tmp"

    @property
    def hub(self) -> Path:
        """Folder of all sources; works as HF_HUB_CACHE."""
        return self.root / "hub"

    @property
    def actives(self) -> Path:
        """Folder of the active records."""
        return self.root / "active"

    @property
    def leases(self) -> Path:
        """Folder of the leases."""
        return self.root / "leases"

    @property
    def model_cache(self) -> Path:
        """Folder of the links to active bucket snapshots."""
        return self.root / "model_cache"

    def source(self, folder: str) -> Path:
        """Folder of one source."""
        return self.hub / validate_name(folder, "source folder")

    def blobs(self, folder: str) -> Path:
        """Folder of a source's blobs."""
        return self.source(folder) / "blobs"

    def blob(self, folder: str, sha256: str) -> Path:
        """A blob's file; `sha256` is 64 hex digits."""
        return self.blobs(folder) / validate_digest(sha256)

    def refs(self, folder: str) -> Path:
        """Folder of a source's refs."""
        return self.source(folder) / "refs"

    def snapshots(self, folder: str) -> Path:
        """Folder of a source's snapshots."""
        return self.source(folder) / "snapshots"

    def commit(self, folder: str, commit: str) -> Path:
        """Folder of the links of one commit."""
        return self.snapshots(folder) / validate_name(commit, "commit")

    def manifests(self, folder: str) -> Path:
        """Folder of a source's manifests."""
        return self.source(folder) / "manifests"

    def manifest(self, folder: str, digest: str) -> Path:
        """A snapshot's manifest."""
        return self.manifests(folder) / f"{validate_digest(digest)}.pb"

    def pruned(self, folder: str, digest: str) -> Path:
        """A former manifest, until its blobs are removed."""
        return self.manifests(folder) / f"{validate_digest(digest)}.pruned"

    def incoming(self, folder: str) -> Path:
        """Folder of a source's partial files."""
        return self.source(folder) / "incoming"

    def part(self, folder: str, key: str) -> Path:
        """One partial file."""
        if "." in key:
            raise InvalidPath(f"{key[:100]!a} cannot be the key of a partial file: it has a dot.")
        return self.incoming(folder) / f"{validate_name(key, 'key of a partial file')}.part"

    def active(self, name: str) -> Path:
        """The active record of `name`."""
        return self.actives / f"{validate_name(name, 'name')}.pb"

    def lease(self, digest: str, holder: str) -> Path:
        """The lease of one holder on one digest."""
        return self.leases / f"{validate_digest(digest)}.{validate_name(holder, 'lease holder')}"


def source_folder(repo_id: str, endpoint: str = "") -> str:
    """Name of a source's folder under hub/.

    Args:
        repo_id: As in `Source.repo_id`: "org/name", "s3://bucket/prefix", "gs://…" or "file:///dir".
        endpoint: Base URL of another bucket service; two services may have buckets of one name. The Hub's own endpoint
            does not matter: a mirror has the same repos, and `HF_HUB_CACHE` users look for them under the same name.

    Returns:
        "models--ORG--NAME" as in the Hugging Face cache, or "buckets--SCHEME--BUCKET-PREFIX-HASH", where HASH (8 hex
        digits) keeps apart what sanitising makes equal.

    Raises:
        InvalidPath: `repo_id` is none of those.
    """
    scheme, separator, rest = repo_id.partition("://")
    if not separator:
        if not _HUB_NAME.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
            raise InvalidPath(f"{repo_id[:200]!a} is not a repo on the Hugging Face Hub; write it as org/name.")
        return "models--" + repo_id.replace("/", "--")
    rest = rest.rstrip("/")
    if scheme not in _BUCKET_SCHEMES or not rest:
        raise InvalidPath(f"{repo_id[:200]!a} is not a source; write org/name, s3://…, gs://… or file:///….")
    scheme = _BUCKET_SCHEMES[scheme]
    unique = hashlib.sha256(f"{scheme}://{rest}\n{endpoint.rstrip('/')}".encode()).hexdigest()[:8]
    readable = _UNSAFE.sub("-", rest).strip("-.")[:80]
    return f"buckets--{scheme}--{readable or 'root'}-{unique}"


def bucket_name(repo_id: str) -> str:
    """Name of a source's link in model_cache/: the bucket's, or the last component of a local folder.

    Args:
        repo_id: As in `Source.repo_id`.

    Returns:
        The name; "" for a repo of the Hugging Face Hub, which has no such link.
    """
    scheme, separator, rest = repo_id.partition("://")
    if not separator:
        return ""
    components = rest.strip("/").split("/")
    name = _UNSAFE.sub("-", components[-1 if scheme == "file" else 0]).strip(".")
    return name[:200] or "root"


def is_digest(text: str) -> bool:
    """Whether `text` is 64 lowercase hex digits."""
    return _HEX64.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` is one safe component of a path."""
    return _NAME.fullmatch(text) is not None


def is_source_folder(text: str) -> bool:
    """Whether a name under hub/ is one that `source_folder` gives; Hugging Face's programs leave others there."""
    return is_name(text) and text.startswith(("models--", "buckets--"))


def validate_digest(digest: str) -> str:
    """Checks that `digest` is 64 lowercase hex digits, and returns it; else raises SnapshotNotFound."""
    if not is_digest(digest):
        raise SnapshotNotFound(f"{digest[:100]!a} is not a digest: 64 lowercase hexadecimal digits are expected.")
    return digest


def validate_name(name: str, what: str) -> str:
    """Checks that `name` is one safe component of a path (letters, digits, ".", "_", "-"), and returns it.

    Args:
        name: At most 200 characters, not starting with ".".
        what: What the name is for, for the message.

    Raises:
        InvalidPath: It is not.
    """
    if not is_name(name):
        raise InvalidPath(f"{name[:100]!a} cannot be a {what}: use letters, digits, '.', '_' and '-', at most 200.")
    return name
