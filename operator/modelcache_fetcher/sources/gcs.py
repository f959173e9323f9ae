"""Google Cloud Storage buckets (https://cloud.google.com/storage/docs/json_api).

google-cloud-storage lists, google-auth signs in; the bytes come from the JSON API's media URLs with a bearer token,
each for one generation of an object. The revision of a bucket is the digest of its listing.
"""

import base64
import binascii
import json
import threading
from typing import Any
from urllib.parse import quote

import google.auth
from google.api_core import exceptions as api_exceptions
from google.auth import exceptions as auth_exceptions
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request
from google.cloud.storage import Client
from google.oauth2.service_account import Credentials as ServiceAccount

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.plan import Checksum, Listing, SourceFile
from modelcache_fetcher.retry import parse_retry_after
from modelcache_fetcher.secrets import SERVICE_ACCOUNT, Secrets
from modelcache_fetcher.sources import HttpLocation
from modelcache_fetcher.sources.buckets import bucket_listing, folder_prefix, path_below, refuse_revision
from modelcache_volume.v1.manifest_pb2 import VERIFICATION_CRC32C, VERIFICATION_MD5

_DEFAULT_ENDPOINT = "https://storage.googleapis.com"
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
_FIELDS = "items(name,size,generation,md5Hash,crc32c,contentEncoding),nextPageToken"


class GcsSource:
    """The objects below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, endpoint: str, secrets: Secrets, api_timeout: float) -> None:
        self._bucket = bucket
        self._prefix = folder_prefix(prefix)
        self._endpoint = (endpoint or _DEFAULT_ENDPOINT).rstrip("/")
        self._default_service = not endpoint
        self._secrets = secrets
        self._api_timeout = api_timeout
        self._lock = threading.Lock()
        self._made: Any = None
        self._encodings: dict[str, str] = {}

    def list_files(self, revision: str | None) -> Listing:
        """List the objects below the prefix; ``gs://b/abc`` does not take ``abc_copy``."""
        refuse_revision(revision)
        doing = f"listing gs://{self._bucket}/{self._prefix}"
        files: list[SourceFile] = []
        try:
            client = Client(
                project="none", credentials=self._credentials(), client_options={"api_endpoint": self._endpoint}
            )
            # Its own retries would hide Retry-After and outlast the deadline: ours are around this call.
            blobs = client.list_blobs(
                self._bucket, prefix=self._prefix, fields=_FIELDS, timeout=self._api_timeout, retry=None
            )
            files.extend(
                self._source_file(path, blob) for blob in blobs if (path := path_below(self._prefix, blob.name))
            )
        except (api_exceptions.GoogleAPIError, auth_exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise self._explain(error, doing) from None
        return bucket_listing(self._bucket, self._prefix, files)

    def examine(self, file: SourceFile) -> SourceFile:
        """The listing says all there is to know."""
        return file

    def locate(self, file: SourceFile, commit: str) -> HttpLocation:
        """The media URL of exactly this generation, as it is stored (gzip is not undone), with a fresh token."""
        del commit
        headers: dict[str, str] = {}
        try:
            credentials = self._credentials()
            if not isinstance(credentials, AnonymousCredentials):
                if not credentials.valid:
                    credentials.refresh(Request())
                credentials.apply(headers)
        except (auth_exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise self._explain(error, f"signing in for gs://{self._bucket}") from None
        name = quote(self._prefix + file.path, safe="")
        url = f"{self._endpoint}/download/storage/v1/b/{self._bucket}/o/{name}?alt=media&generation={file.version}"
        encoding = self._encodings.get(file.path, "")
        if encoding:
            headers["Accept-Encoding"] = encoding
        return HttpLocation(url, headers, stored_encoding=encoding)

    def renew(self) -> None:
        """Read the credentials again at the next call."""
        with self._lock:
            self._made = None

    def _source_file(self, path: str, blob: Any) -> SourceFile:
        if blob.content_encoding:
            self._encodings[path] = blob.content_encoding
        checksums = [
            Checksum(algorithm, value, kind)
            for algorithm, text, kind in (
                ("crc32c", blob.crc32c, VERIFICATION_CRC32C),
                ("md5", blob.md5_hash, VERIFICATION_MD5),
            )
            if (value := _decode(text)) is not None
        ]
        # Every object has a CRC-32C, which costs next to nothing; MD5 is slower than the disk.
        return SourceFile(
            path, int(blob.size), str(blob.generation), version=str(blob.generation), checksums=tuple(checksums[:1])
        )

    def _credentials(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make_credentials()
            return self._made

    def _make_credentials(self) -> Any:
        text = self._secrets.read(SERVICE_ACCOUNT)
        if text is not None:
            try:
                return ServiceAccount.from_service_account_info(json.loads(text), scopes=_SCOPES)  # type: ignore[no-untyped-call]
            except (ValueError, TypeError, AttributeError, KeyError, auth_exceptions.GoogleAuthError):
                # What the library says may quote the key.
                raise FetchError(
                    Reason.SECRET_MISSING,
                    f"The key {SERVICE_ACCOUNT!r} of the secret is no service account's JSON; download a key again.",
                ) from None
        if not self._default_service:
            # The pod's cloud identity is for Google's service, whatever endpoint a manifest names.
            return AnonymousCredentials()  # type: ignore[no-untyped-call]
        try:
            found, _ = google.auth.default(scopes=_SCOPES)
        except auth_exceptions.DefaultCredentialsError:
            return AnonymousCredentials()  # type: ignore[no-untyped-call]
        return found

    def _explain(self, error: Exception, doing: str) -> FetchError:
        where = self._endpoint
        if isinstance(error, api_exceptions.GoogleAPICallError):
            return self._explain_status(error, doing)
        if isinstance(error, auth_exceptions.InvalidOperation) and isinstance(self._made, AnonymousCredentials):
            # google-auth answers a 401 by a refresh, which anonymous credentials do not have.
            return self._refused(401, doing)
        if isinstance(error, auth_exceptions.RefreshError):
            if getattr(error, "retryable", False):
                return FetchError(Reason.UNAVAILABLE, f"Google gives no token now, {doing}; it may later.")
            return FetchError(Reason.AUTH_FAILED, f"Google refused the service account or cloud identity, {doing}.")
        if isinstance(error, auth_exceptions.TransportError | OSError | api_exceptions.RetryError):
            return FetchError(
                Reason.UNAVAILABLE, f"{where} cannot be reached, {doing}: {type(error).__name__}: {error}."
            )
        return FetchError(
            Reason.AUTH_FAILED, f"The Google credentials cannot be used, {doing} ({type(error).__name__})."
        )

    def _explain_status(self, error: api_exceptions.GoogleAPICallError, doing: str) -> FetchError:
        status = int(error.code or 0)
        wait = parse_retry_after(error.response.headers.get("Retry-After") if error.response is not None else None)
        if status == 404:
            return FetchError(Reason.NOT_FOUND, f"{self._endpoint} has no bucket {self._bucket} ({doing}).")
        if status in {401, 403}:
            return self._refused(status, doing)
        if status == 429:
            return FetchError(Reason.RATE_LIMITED, f"{self._endpoint} answered 429 ({doing}).", retry_after=wait)
        if 400 <= status < 500 and status != 408:
            text = f"{self._endpoint} does not accept the request ({status}, {doing})."
            return FetchError(Reason.INVALID_SOURCE, text)
        return FetchError(Reason.UNAVAILABLE, f"{self._endpoint} answered {status}, {doing}.", retry_after=wait)

    def _refused(self, status: int, doing: str) -> FetchError:
        who = "an anonymous request; name a Secret with service_account.json in secretRef"
        who = who if isinstance(self._made, AnonymousCredentials) else "the credentials"
        need = "storage.objects.list and storage.objects.get are needed"
        return FetchError(Reason.AUTH_FAILED, f"{self._endpoint} refused {who} ({status}, {doing}); {need}.")


def _decode(value: str | None) -> bytes | None:
    try:
        return base64.b64decode(value, validate=True) if value else None
    except binascii.Error:
        return None
