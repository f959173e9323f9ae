"""Where models come from. A source lists, authenticates and signs through its own library; it moves no bytes itself.

A new source is one module here with a class that has the methods of ``Source``, a branch in ``make_source`` and a
test class; docs/contributing/sources.md walks through it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelcache_api.source import RepoId
from modelcache_fetcher.plan import Listing, SourceFile
from modelcache_fetcher.secrets import Secrets


@dataclass(frozen=True, slots=True)
class HttpLocation:
    """A file's bytes behind a URL that honours Range.

    Attributes:
        url: May carry a signature in its query: it is never logged or shown.
        headers: Sent to the URL's own host only, not to hosts that it redirects to.
        stored_encoding: The Content-Encoding that the content is stored, and sent, with.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    stored_encoding: str = ""


@dataclass(frozen=True, slots=True)
class LocalLocation:
    """A file on this machine.

    Attributes:
        path: Its real path: the last component is no symlink.
        identity: The (device, inode, size, mtime_ns) that it was planned with.
    """

    path: str
    identity: tuple[int, int, int, int]

    @staticmethod
    def identity_of(stat: os.stat_result) -> tuple[int, int, int, int]:
        """What must stay the same while a file is read."""
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


Location = HttpLocation | LocalLocation


class Source(Protocol):
    """One repo, bucket prefix or folder."""

    def list_files(self, revision: str | None) -> Listing:
        """Resolve the revision and list everything in it.

        Raises:
            FetchError: AuthFailed, SecretMissing, NotFound, InvalidSource, RateLimited or Unavailable.
        """
        ...

    def examine(self, file: SourceFile) -> SourceFile:
        """What more the source knows about a listed file that is about to be fetched: checksums, version.

        Called from several threads at once.

        Raises:
            SourceChangedError: It is no longer what was listed.
            FetchError: As ``list_files``.
        """
        ...

    def locate(self, file: SourceFile, commit: str) -> Location:
        """Where a listed file's bytes are now. Called again when the answer was refused or has expired.

        Raises:
            FetchError: As ``list_files``.
        """
        ...

    def renew(self) -> None:
        """Forget credentials: the next call reads the secrets again. Called when the source refused them."""
        ...


def make_source(repo: RepoId, endpoint: str, secrets: Secrets, api_timeout: float) -> Source:
    """The source of a parsed repoId.

    Args:
        repo: Where the model is.
        endpoint: Base URL of another hub or bucket service; "" for the default.
        secrets: The credentials' folder.
        api_timeout: Seconds without an answer after which a call of the source's API fails.
    """
    # A cloud's library is imported only when its source is used: they are large, and a folder needs none.
    match repo.scheme:
        case "hf":
            from modelcache_fetcher.sources.huggingface import HuggingFaceSource  # noqa: PLC0415

            return HuggingFaceSource(repo.name, endpoint, secrets, api_timeout)
        case "file":
            from modelcache_fetcher.sources.local import LocalSource  # noqa: PLC0415

            return LocalSource(repo.name)
        case "s3":
            from modelcache_fetcher.sources.s3 import S3Source  # noqa: PLC0415

            return S3Source(repo.name, repo.prefix, endpoint, secrets, api_timeout)
        case "gs":
            from modelcache_fetcher.sources.gcs import GcsSource  # noqa: PLC0415

            return GcsSource(repo.name, repo.prefix, endpoint, secrets, api_timeout)
