"""spec.repoId: where a model comes from, parsed and brought to one canonical form.

Rules for names follow https://huggingface.co/docs/huggingface_hub (validate_repo_id),
https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html and
https://cloud.google.com/storage/docs/buckets#naming.
"""

import posixpath
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Scheme = Literal["hf", "s3", "gs", "file"]

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_S3_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_GS_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMS = "org/name, hf://org/name, s3://bucket/prefix, gs://bucket/prefix or file:///folder"


@dataclass(frozen=True, slots=True)
class RepoId:
    """A parsed repoId.

    Attributes:
        scheme: "hf", "s3", "gs" or "file".
        name: "org/name" on a hub, the bucket, or the folder's absolute path.
        prefix: Inside a bucket, without slashes at its ends; "" is the whole bucket.
    """

    scheme: Scheme
    name: str
    prefix: str = ""

    @property
    def canonical(self) -> str:
        """The one spelling that names this source: "org/name", "s3://bucket/prefix", "file:///folder"."""
        if self.scheme == "hf":
            return self.name
        return f"{self.scheme}://{self.name}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def has_revisions(self) -> bool:
        """Whether the source has branches, tags and commits of its own."""
        return self.scheme == "hf"


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit id (40 hex digits), which never moves."""
    return _COMMIT.fullmatch(revision) is not None


@lru_cache(maxsize=1024)
def parse_repo_id(text: str) -> RepoId:
    """Parse spec.repoId.

    Args:
        text: "org/name", "hf://org/name", "s3://bucket[/prefix]", "gs://…", "gcs://…" or "file:///folder". What follows
            the scheme is taken as it is: nothing is percent-decoded.

    Raises:
        ValueError: It is none of these; the message says what to write instead.
    """
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise ValueError(f"{text!r} has a control character in it")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _hugging_face(text, text)
    match scheme:
        case "hf":
            return _hugging_face(rest, text)
        case "s3":
            return _bucket("s3", rest, text)
        case "gs" | "gcs":
            return _bucket("gs", rest, text)
        case "file":
            return _folder(rest, text)
        case "http" | "https":
            raise ValueError(f"{text!r} is a URL; write {_FORMS}, and another hub's address in endpoint")
    raise ValueError(f"{text!r} has an unknown scheme; write {_FORMS}")


def _hugging_face(name: str, text: str) -> RepoId:
    if "@" in name:
        repo, _, revision = name.partition("@")
        raise ValueError(f"{text!r} names a revision; write repoId: {repo} and revision: {revision}")
    parts = name.split("/")
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{text!r} looks like a folder; write file:///folder (local mode) or org/name")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) for part in parts) or len(name) > 96:
        raise ValueError(f"{text!r} is no repo; write {_FORMS}")
    if "--" in name or ".." in name:
        raise ValueError(f"{text!r} is no Hugging Face repo: its name cannot contain '--' or '..'")
    return RepoId("hf", name)


def _bucket(scheme: Literal["s3", "gs"], rest: str, text: str) -> RepoId:
    bucket, _, prefix = rest.partition("/")
    pattern = _S3_BUCKET if scheme == "s3" else _GS_BUCKET
    if not pattern.fullmatch(bucket) or ".." in bucket:
        raise ValueError(f"{text!r} names no valid bucket; write {scheme}://bucket or {scheme}://bucket/prefix")
    prefix = prefix.rstrip("/")
    if prefix and any(part in {"", ".", ".."} for part in prefix.split("/")):
        raise ValueError(f"{text!r} has an empty, '.' or '..' part in its prefix; write {scheme}://bucket/prefix")
    return RepoId(scheme, bucket, prefix)


def _folder(path: str, text: str) -> RepoId:
    if not path.startswith("/"):
        raise ValueError(f"{text!r} is not absolute; write file:///folder with three slashes")
    normal = posixpath.normpath("/" + path.lstrip("/"))
    if normal == "/":
        raise ValueError(f"{text!r} is the root folder; name the model's own folder")
    return RepoId("file", normal)
