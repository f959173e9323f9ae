"""S3 buckets, on AWS or any service that speaks its API (https://docs.aws.amazon.com/AmazonS3/latest/API/).

boto3 lists and signs; the bytes come from presigned URLs. The revision of a bucket is the digest of its listing.
"""

import base64
import binascii
import json
import threading
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from modelcache_api.reasons import Reason
from modelcache_fetcher.checksums import ALGORITHMS
from modelcache_fetcher.errors import FetchError, SourceChangedError
from modelcache_fetcher.plan import Checksum, Listing, SourceFile
from modelcache_fetcher.secrets import S3_CREDENTIALS, Secrets
from modelcache_fetcher.sources import HttpLocation
from modelcache_fetcher.sources.buckets import bucket_listing, folder_prefix, path_below, refuse_revision
from modelcache_volume.v1.manifest_pb2 import VERIFICATION_MD5, VERIFICATION_S3_CHECKSUM

_URL_SECONDS = 3600
_ARCHIVED = frozenset({"GLACIER", "DEEP_ARCHIVE"})
_DENIED = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "AuthFailure",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "401",
        "403",
    }
)
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey", "NotFound", "404"})
_CHECKSUM_FIELDS = {
    "sha256": "ChecksumSHA256",
    "crc64nvme": "ChecksumCRC64NVME",
    "crc32c": "ChecksumCRC32C",
    "crc32": "ChecksumCRC32",
    "sha1": "ChecksumSHA1",
}
"""By strength, as the manifest names one of them."""


class S3Source:
    """The objects below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, endpoint: str, secrets: Secrets, api_timeout: float) -> None:
        self._bucket = bucket
        self._prefix = folder_prefix(prefix)
        self._endpoint = endpoint
        self._secrets = secrets
        self._api_timeout = api_timeout
        self._lock = threading.Lock()
        self._made: Any = None
        self._anonymous = False
        self._region = ""

    def list_files(self, revision: str | None) -> Listing:
        """List the objects below the prefix; ``s3://b/abc`` does not take ``abc_copy``."""
        refuse_revision(revision)
        files: list[SourceFile] = []
        try:
            client = self._client()
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix):
                self._learn_region(page)
                files.extend(
                    SourceFile(path, item["Size"], item["ETag"].strip('"'))
                    for item in page.get("Contents", ())
                    if (path := path_below(self._prefix, item["Key"]))
                )
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error, f"listing s3://{self._bucket}/{self._prefix}") from None
        return bucket_listing(self._bucket, self._prefix, files)

    def examine(self, file: SourceFile) -> SourceFile:
        """Ask for the object's version and checksums, which a listing does not have."""
        key = self._prefix + file.path
        try:
            head = self._client().head_object(Bucket=self._bucket, Key=key, ChecksumMode="ENABLED")
        except (BotoCoreError, ClientError) as error:
            code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
            if code in _MISSING:
                raise SourceChangedError(file.path, f"{file.path} is no longer in the bucket.") from None
            if code == "400":  # an answer to HEAD has no body that could say more
                raise FetchError(
                    Reason.INVALID_SOURCE,
                    f"{self._endpoint or 'S3'} refuses to give out {file.path} (400): it is probably encrypted with a "
                    "customer's key (SSE-C), which is not supported. Copy the object to one that S3 or KMS encrypts, "
                    "or leave it out with ignorePatterns.",
                    path=file.path,
                ) from None
            raise self._explain(error, f"reading s3://{self._bucket}/{key}") from None
        if head["ETag"].strip('"') != file.etag or head["ContentLength"] != file.size:
            raise SourceChangedError(file.path, f"{file.path} was replaced in the bucket.")
        if head.get("StorageClass") in _ARCHIVED and 'ongoing-request="false"' not in head.get("Restore", ""):
            text = f"{file.path} is archived ({head['StorageClass']}); restore the object first, then fetch again."
            raise FetchError(Reason.INVALID_SOURCE, text, path=file.path)
        return SourceFile(
            file.path,
            file.size,
            file.etag,
            version=head.get("VersionId", "").replace("null", ""),
            checksums=_checksums(head),
            unchecked_note=_composite(head),
        )

    def locate(self, file: SourceFile, commit: str) -> HttpLocation:
        """A presigned URL of exactly this version, good for an hour."""
        del commit
        parameters = {"Bucket": self._bucket, "Key": self._prefix + file.path}
        if file.version:
            parameters["VersionId"] = file.version
        try:
            url = self._client().generate_presigned_url("get_object", Params=parameters, ExpiresIn=_URL_SECONDS)
        except (BotoCoreError, ClientError) as error:
            raise self._explain(error, f"signing for s3://{self._bucket}") from None
        return HttpLocation(url, {"If-Match": f'"{file.etag}"'})

    def renew(self) -> None:
        """Read the credentials again at the next call."""
        with self._lock:
            self._made = None

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make_client()
            return self._made

    def _make_client(self) -> Any:
        text = self._secrets.read(S3_CREDENTIALS)
        given = _parse_credentials(text) if text is not None else {}
        session = botocore.session.Session()
        if given:
            session.set_credentials(given["access_key_id"], given["secret_access_key"], given.get("session_token"))
        # Without a secret: the pod's own cloud identity if it has one, else anonymous.
        self._anonymous = not given and session.get_credentials() is None
        region = self._region or given.get("region") or session.get_config_variable("region") or "us-east-1"
        host = urlsplit(self._endpoint).hostname or ""
        path_style = bool(self._endpoint) and not host.endswith(".amazonaws.com")
        config = Config(
            signature_version=UNSIGNED if self._anonymous else "s3v4",
            s3={"addressing_style": "path" if path_style else "auto"},
            connect_timeout=self._api_timeout,
            read_timeout=self._api_timeout,
            retries={"mode": "standard", "max_attempts": 2},
            user_agent_extra="modelcache-fetch",
        )
        return boto3.session.Session(botocore_session=session).client(
            "s3", region_name=region, endpoint_url=self._endpoint or None, config=config
        )

    def _learn_region(self, page: dict[str, Any]) -> None:
        """Botocore follows a bucket to its region when it lists, but signs URLs for the one it was told."""
        region = page["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", "")
        if region and region != self._region and not self._endpoint:
            self._region = region
            if self._client().meta.region_name != region:
                self.renew()

    def _explain(self, error: Exception, doing: str) -> FetchError:
        where = self._endpoint or "S3"
        if isinstance(error, ClientError):
            return self._explain_code(error, doing, where)
        if isinstance(error, PartialCredentialsError | NoCredentialsError):
            return FetchError(Reason.SECRET_MISSING, f"The credentials for {where} are incomplete: {error}.")
        if isinstance(error, CredentialRetrievalError):
            return FetchError(
                Reason.AUTH_FAILED, f"The cloud identity of this pod gives no credentials for {where}: {error}."
            )
        if isinstance(error, ParamValidationError):
            return FetchError(
                Reason.INVALID_SOURCE, f"{where} is asked for something it cannot have, {doing}: {error}."
            )
        return FetchError(Reason.UNAVAILABLE, f"{where} cannot be reached, {doing}: {type(error).__name__}: {error}.")

    def _explain_code(self, error: ClientError, doing: str, where: str) -> FetchError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _MISSING:
            return FetchError(Reason.NOT_FOUND, f"{where} has no bucket {self._bucket} ({code}, {doing}).")
        if code in _DENIED or status in {401, 403}:
            who = "an anonymous request; name a Secret with s3_credentials.json in secretRef"
            who = who if self._anonymous else "the credentials"
            need = "s3:GetObject and s3:ListBucket are needed"
            return FetchError(Reason.AUTH_FAILED, f"{where} refused {who} ({code}, {doing}); {need}.")
        if status == 429 or code in {"TooManyRequests", "RequestLimitExceeded"}:
            return FetchError(Reason.RATE_LIMITED, f"{where} has too many requests ({code}, {doing}).")
        if 400 <= status < 500 and status != 408:
            return FetchError(
                Reason.INVALID_SOURCE, f"{where} does not accept the request ({code or status}, {doing})."
            )
        return FetchError(Reason.UNAVAILABLE, f"{where} answered {code or status}, {doing}.")


def _parse_credentials(text: str) -> dict[str, str]:
    """Truss's s3_credentials.json, with long names (aws_access_key_id) or short ones (access_key_id)."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise FetchError(Reason.SECRET_MISSING, f"The key {S3_CREDENTIALS!r} of the secret is no JSON object.")
    found = {name.removeprefix("aws_"): value for name, value in document.items() if isinstance(value, str) and value}
    missing = [name for name in ("access_key_id", "secret_access_key") if name not in found]
    if missing:
        raise FetchError(
            Reason.SECRET_MISSING,
            f"The key {S3_CREDENTIALS!r} of the secret lacks {' and '.join(f'aws_{name}' for name in missing)}.",
        )
    return found


def _checksums(head: dict[str, Any]) -> tuple[Checksum, ...]:
    """The strongest checksum of the whole object.

    An ETag is the content's MD5 only for objects uploaded in one part and not encrypted by KMS or a customer's key
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html).
    """
    if head.get("ChecksumType") != "COMPOSITE":
        for algorithm, field in _CHECKSUM_FIELDS.items():
            value = _decode(head.get(field, ""))
            if value is not None and algorithm in ALGORITHMS:
                return (Checksum(algorithm, value, VERIFICATION_S3_CHECKSUM),)
    etag = head["ETag"].strip('"')
    encrypted = "SSECustomerAlgorithm" in head or head.get("ServerSideEncryption", "AES256") != "AES256"
    if len(etag) == 32 and not encrypted:
        try:
            return (Checksum("md5", bytes.fromhex(etag), VERIFICATION_MD5),)
        except ValueError:
            return ()
    return ()


def _composite(head: dict[str, Any]) -> str:
    """A checksum of parts' checksums, for the record: it cannot be compared without knowing the parts."""
    for algorithm, field in _CHECKSUM_FIELDS.items():
        if "-" in head.get(field, ""):
            return f"{algorithm}:{head[field]}"
    return ""


def _decode(value: str) -> bytes | None:
    if "-" in value or not value:
        return None
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        return None
