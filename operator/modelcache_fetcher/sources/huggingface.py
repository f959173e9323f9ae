"""Hugging Face repos, on huggingface.co or any hub that speaks its API (https://huggingface.co/docs/hub/api).

huggingface_hub resolves revisions and lists; the bytes come from ``/ORG/NAME/resolve/COMMIT/PATH``, which answers small
files itself and redirects LFS files to another host with a signed URL.
"""

import os
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.plan import Checksum, Listing, SourceFile
from modelcache_fetcher.retry import parse_retry_after
from modelcache_fetcher.secrets import HF_TOKEN, Secrets
from modelcache_fetcher.sources import HttpLocation
from modelcache_volume.v1.manifest_pb2 import VERIFICATION_GIT_BLOB_SHA1, VERIFICATION_LFS_SHA256

_Result = TypeVar("_Result")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 2**60

# Telemetry would ask huggingface.co which agents there are, also from clusters that may reach another hub only.
constants.HF_HUB_DISABLE_TELEMETRY = True


class HuggingFaceSource:
    """A model repo on a hub."""

    def __init__(self, repo_id: str, endpoint: str, secrets: Secrets, api_timeout: float) -> None:
        self._repo_id = repo_id
        self._default_hub = not endpoint
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._secrets = secrets
        self._api_timeout = api_timeout
        self._token: str | None = None
        self._token_read = False

    def list_files(self, revision: str | None) -> Listing:
        """Resolve a branch, tag, full or short commit and list the repo's files."""
        requested = revision or "main"
        api = HfApi(endpoint=self._endpoint, token=self._current_token() or False)

        def ask() -> Listing:
            info = api.repo_info(self._repo_id, revision=requested, timeout=self._api_timeout)
            commit = str(info.sha)
            if not _COMMIT.fullmatch(commit):
                raise _senseless(f"the commit {commit[:80]!a}")
            tree = api.list_repo_tree(self._repo_id, recursive=True, revision=commit)
            files = tuple(_source_file(entry) for entry in tree if isinstance(entry, RepoFile))
            return Listing(requested, commit, files)

        return self._call(ask, requested)

    def examine(self, file: SourceFile) -> SourceFile:
        """The listing says all there is to know."""
        return file

    def locate(self, file: SourceFile, commit: str) -> HttpLocation:
        """The resolve URL of a file of one commit."""
        url = f"{self._endpoint}/{self._repo_id}/resolve/{commit}/{quote(file.path)}"
        token = self._current_token()
        return HttpLocation(url, {"Authorization": f"Bearer {token}"} if token else {})

    def renew(self) -> None:
        """Read the token again at the next call."""
        self._token_read = False

    def _current_token(self) -> str | None:
        if not self._token_read:
            self._token = self._secrets.read(HF_TOKEN)
            # A machine where somebody is logged in has a token of its own; it belongs to the default hub and is shown
            # to no other, whatever endpoint a manifest names.
            if self._token is None and self._default_hub and not os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
                self._token = get_token()
            self._token_read = True
        return self._token

    def _call(self, ask: Callable[[], _Result], revision: str) -> _Result:
        # Paginated listings take no timeout argument, and the shared session would wait for ever.
        get_session().timeout = self._api_timeout
        try:
            return ask()
        except FetchError:
            raise
        except (TypeError, AttributeError, KeyError) as error:  # huggingface_hub takes the hub's JSON as it comes
            raise _senseless(f"a listing that is none ({type(error).__name__}: {error})") from error
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
            raise self._explain(error, revision) from None
        except Exception as error:
            # The HTTP library behind huggingface_hub changed twice; its transport errors have no common public base.
            if type(error).__module__.partition(".")[0].startswith("httpx"):
                raise self._explain(error, revision) from None
            raise

    def _explain(self, error: Exception, revision: str) -> FetchError:
        repo, hub = self._repo_id, self._endpoint
        who = "the token" if self._token else "an anonymous request; name a Secret with hf_access_token in secretRef"
        match error:
            case GatedRepoError():
                text = f"{repo} is gated: {hub} refused {who}. Ask for access on {hub}/{repo} with the token's account."
                reason = Reason.AUTH_FAILED
            case DisabledRepoError():
                reason, text = Reason.AUTH_FAILED, f"{hub} has disabled access to {repo}."
            case RevisionNotFoundError():
                text = f"{repo} on {hub} has no revision {revision!r}; name a branch, tag or commit that exists."
                reason = Reason.NOT_FOUND
            case RepositoryNotFoundError():
                reason, text = Reason.NOT_FOUND, f"{hub} has no repo {repo}, or it is private and refused {who}."
            case HFValidationError():
                reason, text = Reason.INVALID_SOURCE, f"repoId {repo!r} is refused: {error}"
            case OfflineModeIsEnabled():
                text = "HF_HUB_OFFLINE is set, so that no hub may be asked; unset it for the fetch."
                reason = Reason.UNAVAILABLE
            case HfHubHTTPError():
                return self._explain_status(error.response.status_code, error.response.headers.get("Retry-After"), who)
            case _:
                text = f"{hub} cannot be reached for {repo} ({type(error).__name__}: {error})."
                reason = Reason.UNAVAILABLE
        return FetchError(reason, text)

    def _explain_status(self, status: int, retry_after: str | None, who: str) -> FetchError:
        repo, hub = self._repo_id, self._endpoint
        match status:
            case 401 | 403:
                text = f"{hub} refused {who} ({status}) for {repo}."
                if self._token:
                    text += " Check the Secret's hf_access_token, and that its account may read the repo."
                return FetchError(Reason.AUTH_FAILED, text)
            case 404:
                text = f"{hub} has no repo {repo}, or speaks no Hugging Face API (404)."
                return FetchError(Reason.NOT_FOUND, text)
            case 429:
                wait = parse_retry_after(retry_after)
                return FetchError(Reason.RATE_LIMITED, f"{hub} answered 429 (too many requests).", retry_after=wait)
        if 400 <= status < 500 and status != 408:
            return FetchError(Reason.INVALID_SOURCE, f"{hub} does not accept the request for {repo} ({status}).")
        wait = parse_retry_after(retry_after)
        return FetchError(Reason.UNAVAILABLE, f"{hub} answered {status} when asked for {repo}.", retry_after=wait)


def _senseless(what: str) -> FetchError:
    return FetchError(Reason.INVALID_SOURCE, f"The hub answered {what}; is endpoint that of a Hugging Face Hub?")


def _source_file(entry: RepoFile) -> SourceFile:
    size = entry.size if entry.lfs is None else entry.lfs.size
    if not isinstance(entry.path, str) or type(size) is not int or not 0 <= size < _MAX_FILE_BYTES:
        raise _senseless(f"a file {entry.path!a} of {size!a} bytes")
    if entry.lfs is not None:
        sha256 = entry.lfs.sha256.lower()
        if not _SHA256.fullmatch(sha256):
            raise _senseless(f"the LFS oid {sha256[:80]!a} for {entry.path!a}")
        checksum = Checksum("sha256", bytes.fromhex(sha256), VERIFICATION_LFS_SHA256)
        return SourceFile(entry.path, size, sha256, checksums=(checksum,), git_oid=entry.blob_id, lfs_sha256=sha256)
    if not _COMMIT.fullmatch(entry.blob_id):
        raise _senseless(f"the oid {entry.blob_id[:80]!a} for {entry.path!a}")
    checksum = Checksum("git-blob-sha1", bytes.fromhex(entry.blob_id), VERIFICATION_GIT_BLOB_SHA1)
    return SourceFile(entry.path, size, entry.blob_id, checksums=(checksum,), git_oid=entry.blob_id)
