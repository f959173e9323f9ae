"""Fetching from S3: a real moto server."""

import hashlib
import json
import random
import re
import threading

import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, make_plan, run_fetch
from modelcache_volume import Volume
from modelcache_volume.v1 import manifest_pb2
from support.cli import make_folder
from support.cloud_identity import serve
from support.fake_buckets import S3Handler
from support.fetching import contents, options, safetensors_bytes, spec
from support.object_stores import ACCESS_KEY, SECRET_KEY, models_bucket, moto_server

BIG = safetensors_bytes({"a": 17 * 2**20, "b": 2**20 + 5})
FILES = {"config.json": b"{}", "model.safetensors": BIG, "sub/vocab.txt": b"a\nb\n"}


@pytest.fixture(scope="module")
def server():
    with moto_server() as url:
        yield url


@pytest.fixture
def s3(server):
    return models_bucket(server)


@pytest.fixture
def bucket(server):
    return models_bucket(server, FILES)


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


@pytest.fixture(autouse=True)
def no_identity(monkeypatch, tmp_path):
    """No credentials but those that a test gives."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def secrets(tmp_path, **credentials):
    folder = tmp_path / "secrets"
    folder.mkdir(exist_ok=True)
    (folder / "s3_credentials.json").write_text(json.dumps(credentials))
    return folder


@pytest.fixture
def keys(tmp_path):
    return secrets(tmp_path, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, aws_region="us-east-1")


def fetch(server, volume, keys, repo="s3://models/bert", **fields):
    given = options(secrets_dir=keys)
    return run_fetch(spec(repo, endpoint=server, secret_ref={"name": "s3"}, **fields), volume, "model", options=given)


def entries(volume):
    (snapshot,) = Volume.open(volume).snapshots()
    return {file.path: file for file in snapshot.manifest.files}


def test_a_prefix_is_fetched_and_nothing_beside_it(server, bucket, volume, keys):
    bucket.put_object(Bucket="models", Key="bert_copy/config.json", Body=b"other")
    bucket.put_object(Bucket="models", Key="bert", Body=b"an object named as the prefix")
    result = fetch(server, volume, keys)
    assert contents(volume, "model") == FILES
    assert len(bytes.fromhex(result.commit)) == 20
    assert Volume.open(volume).active("model").requested == ""
    link = volume / "model_cache" / "models"
    assert (link / "config.json").read_bytes() == b"{}"


def test_a_whole_bucket_and_folder_markers(server, s3, volume, keys):
    for key in ("a/", "a/b/", "a/b/config.json"):
        s3.put_object(Bucket="models", Key=key, Body=b"{}" if key.endswith("json") else b"")
    fetch(server, volume, keys, repo="s3://models")
    assert contents(volume, "model") == {"a/b/config.json": b"{}"}


def test_patterns_are_on_the_path_below_the_prefix(server, bucket, volume, keys):
    fetch(server, volume, keys, allow_patterns=["*.json"])
    assert list(contents(volume, "model")) == ["config.json"]


def test_many_objects_take_several_pages(server, s3, keys):
    for number in range(25):
        s3.put_object(Bucket="models", Key=f"many/{number}", Body=b"")
    plan = make_plan(spec("s3://models/many", endpoint=server, secret_ref={"name": "s3"}), options(secrets_dir=keys))
    assert len(plan.files) == 25


def test_a_public_bucket_needs_no_secret(server, bucket, volume):
    for path in FILES:
        bucket.put_object_acl(Bucket="models", Key=f"bert/{path}", ACL="public-read")
    run_fetch(spec("s3://models/bert", endpoint=server), volume, "model", options=options())
    assert contents(volume, "model") == FILES


def test_a_private_object_refuses_the_anonymous(server, bucket, volume):
    with pytest.raises(FetchError) as caught:
        run_fetch(spec("s3://models/bert", endpoint=server), volume, "model", options=options())
    assert caught.value.reason is Reason.AUTH_FAILED
    assert "s3:GetObject" in str(caught.value)


def test_short_names_and_session_tokens_are_known(server, bucket, volume, tmp_path):
    keys = secrets(
        tmp_path, access_key_id="A" * 20, secret_access_key="s" * 40, region="eu-west-1", session_token="tok/en+="
    )
    fetch(server, volume, keys)
    assert contents(volume, "model") == FILES


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC32", "CRC32C", "SHA1", "CRC64NVME"])
def test_a_stated_checksum_is_compared(server, s3, volume, keys, algorithm):
    s3.put_object(Bucket="models", Key="bert/model.safetensors", Body=BIG, ChecksumAlgorithm=algorithm)
    head = s3.head_object(Bucket="models", Key="bert/model.safetensors", ChecksumMode="ENABLED")
    assert f"Checksum{algorithm}" in head
    fetch(server, volume, keys)
    entry = entries(volume)["model.safetensors"]
    assert entry.verification == manifest_pb2.VERIFICATION_S3_CHECKSUM
    assert entry.verified_with.startswith(algorithm.lower())


def test_multipart_objects_are_unverified_at_source_but_fetched(server, s3, volume, keys):
    upload = s3.create_multipart_upload(Bucket="models", Key="bert/model.safetensors")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(BIG), 6 * 2**20), start=1):
        part = s3.upload_part(
            Bucket="models",
            Key="bert/model.safetensors",
            PartNumber=number,
            UploadId=upload,
            Body=BIG[start : start + 6 * 2**20],
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    s3.complete_multipart_upload(
        Bucket="models", Key="bert/model.safetensors", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    fetch(server, volume, keys)
    assert contents(volume, "model") == {"model.safetensors": BIG}
    entry = entries(volume)["model.safetensors"]
    assert entry.verification == manifest_pb2.VERIFICATION_NONE
    assert entry.etag.endswith("-4")


@pytest.mark.parametrize("stated", ["FULL_OBJECT", "COMPOSITE", "damaged"])
def test_a_multipart_object_is_compared_only_with_a_checksum_of_the_whole(volume, keys, tmp_path, stated):
    class Store(S3Handler):
        def stated(self, file):
            whole = super().stated(file)
            return {
                "FULL_OBJECT": whole,
                "COMPOSITE": {"x-amz-checksum-crc32c": "AAAAAA==-2", "x-amz-checksum-type": "COMPOSITE"},
                "damaged": {**whole, "x-amz-checksum-crc32c": "AAAAAA=="},
            }[stated]

    with serve(Store, root=make_folder(tmp_path / "bucket", {"model.safetensors": BIG})) as (store, _):
        if stated == "damaged":
            assert fails(store.url, volume, keys, repo="s3://models").reason is Reason.CHECKSUM_MISMATCH
            return
        fetch(store.url, volume, keys, repo="s3://models")
    entry = entries(volume)["model.safetensors"]
    whole = stated == "FULL_OBJECT"
    assert entry.verification == (manifest_pb2.VERIFICATION_S3_CHECKSUM if whole else manifest_pb2.VERIFICATION_NONE)
    assert entry.verified_with.startswith("crc32c:")
    assert entry.etag.endswith("-2")


ENCRYPTION = "x-amz-server-side-encryption"


@pytest.mark.parametrize(
    ("headers", "content", "compared"),
    [
        ({}, b"{}", True),
        ({ENCRYPTION: "AES256"}, b"{}", True),
        ({}, b"damaged", None),
        ({ENCRYPTION: "AES256"}, b"damaged", None),
        ({ENCRYPTION: "aws:kms"}, b"damaged", False),
        ({ENCRYPTION: "aws:kms:dsse"}, b"damaged", False),
        ({f"{ENCRYPTION}-customer-algorithm": "AES256"}, b"damaged", False),
    ],
)
def test_an_etag_is_taken_for_an_md5_only_where_s3_says_that_it_is_one(
    volume, keys, tmp_path, headers, content, compared
):
    """With KMS and customers' keys the ETag looks like an MD5 and is that of something else."""

    class Store(S3Handler):
        def etag(self, file):
            return hashlib.md5(b"{}").hexdigest()

        def stated(self, file):
            return headers

    with serve(Store, root=make_folder(tmp_path / "bucket", {"config.json": content})) as (store, _):
        if compared is None:
            assert fails(store.url, volume, keys, repo="s3://models").reason is Reason.CHECKSUM_MISMATCH
            return
        fetch(store.url, volume, keys, repo="s3://models")
    assert contents(volume, "model") == {"config.json": content}
    wanted = manifest_pb2.VERIFICATION_MD5 if compared else manifest_pb2.VERIFICATION_NONE
    assert entries(volume)["config.json"].verification == wanted


class Unchecked(S3Handler):
    """States nothing that the bytes could be compared with: only the protocol says which bytes they are."""

    def stated(self, file):
        return {}


TEXT = random.Random(1).randbytes(40 * 2**20)


def test_a_range_that_is_another_than_the_asked_one_is_not_taken(volume, keys, tmp_path):
    shifted = []

    class Store(Unchecked):
        def send_file(self, source, headers):
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and int(asked[1]) and not shifted:
                shifted.append(asked[0])
                self.headers.replace_header("Range", f"bytes={int(asked[1]) - 1}-{asked[2]}")
            super().send_file(source, headers)

    with serve(Store, root=make_folder(tmp_path / "bucket", {"vocab.txt": TEXT})) as (store, _):
        fetch(store.url, volume, keys, repo="s3://models")
    assert shifted
    assert contents(volume, "model")["vocab.txt"] == TEXT


@pytest.mark.parametrize("redirected", [False, True])
def test_an_object_replaced_while_it_is_read_is_never_mixed_with_its_successor(volume, keys, tmp_path, redirected):
    root = make_folder(tmp_path / "bucket", {"vocab.txt": TEXT})
    successor = TEXT[::-1]
    replacing = threading.Lock()

    class Store(Unchecked):
        def route(self, path, query):
            host = self.headers["Host"]
            if redirected and self.command == "GET" and path.endswith("vocab.txt") and "127.0.0.1" in host:
                self.send_text(307, "", {"Location": f"http://{host.replace('127.0.0.1', 'localhost')}{self.path}"})
                return
            super().route(path, query)

        def send_file(self, source, headers):
            super().send_file(source, headers)
            if self.command == "GET" and replacing.acquire(blocking=False):
                (root / "new").write_bytes(successor)
                (root / "new").rename(root / "vocab.txt")

    with serve(Store, root=root) as (store, _):
        fetch(store.url, volume, keys, repo="s3://models", fetch={"concurrency": 1})
    assert contents(volume, "model")["vocab.txt"] == successor


def test_what_is_encrypted_with_a_customers_key_is_said(volume, keys, tmp_path):
    """S3 refuses whoever asks for it without the key, by a 400; HEAD has no body that could say why."""

    class Store(S3Handler):
        def route(self, path, query):
            if path.endswith("config.json"):
                self.send_text(400, "")
            else:
                super().route(path, query)

    with serve(Store, root=make_folder(tmp_path / "bucket", {"config.json": b"{}"})) as (store, _):
        error = fails(store.url, volume, keys, repo="s3://models")
    assert error.reason is Reason.INVALID_SOURCE
    assert "config.json" in str(error)
    assert "SSE-C" in str(error)
    assert "ignorePatterns" in str(error)


def test_versioned_buckets_give_the_newest_version(server, s3, volume, keys):
    s3.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    for content in (b"old", b"new"):
        s3.put_object(Bucket="models", Key="bert/config.json", Body=content)
    fetch(server, volume, keys)
    assert contents(volume, "model") == {"config.json": b"new"}


@pytest.mark.parametrize("change", ["put_object", "delete_object"])
def test_in_a_versioned_bucket_the_planned_version_is_fetched_whatever_comes_after_it(
    server, bucket, volume, keys, monkeypatch, change
):
    from modelcache_fetcher.sources.s3 import S3Source

    bucket.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    bucket.put_object(Bucket="models", Key="bert/config.json", Body=b"[0]")
    real = S3Source.examine

    def examine_then_change(self, file):
        examined = real(self, file)
        if file.path == "config.json":
            more = {"Body": b"[1]"} if change == "put_object" else {}
            getattr(bucket, change)(Bucket="models", Key="bert/config.json", **more)
        return examined

    monkeypatch.setattr(S3Source, "examine", examine_then_change)
    fetch(server, volume, keys)
    assert contents(volume, "model") == {**FILES, "config.json": b"[0]"}


def test_only_a_changed_object_is_fetched_again(server, bucket, volume, keys):
    first = fetch(server, volume, keys)
    assert fetch(server, volume, keys).downloaded_bytes == 0
    bucket.put_object(Bucket="models", Key="bert/config.json", Body=b"[1]")
    second = fetch(server, volume, keys)
    assert second.downloaded_bytes == 3
    assert second.commit != first.commit
    assert contents(volume, "model") == {**FILES, "config.json": b"[1]"}


def test_an_object_replaced_between_plan_and_download_is_planned_anew(server, bucket, volume, keys, monkeypatch):
    from modelcache_fetcher.sources.s3 import S3Source

    real, changed = S3Source.list_files, []

    def list_then_change(self, revision):
        listing = real(self, revision)
        if not changed:
            changed.append(bucket.put_object(Bucket="models", Key="bert/config.json", Body=b"[1, 2]"))
        return listing

    monkeypatch.setattr(S3Source, "list_files", list_then_change)
    fetch(server, volume, keys)
    assert contents(volume, "model") == {**FILES, "config.json": b"[1, 2]"}


def test_an_object_replaced_after_its_examination_is_noticed(server, bucket, volume, keys, monkeypatch):
    from modelcache_fetcher.sources.s3 import S3Source

    real, changed = S3Source.examine, []

    def examine_then_change(self, file):
        examined = real(self, file)
        if file.path == "config.json" and not changed:
            changed.append(bucket.put_object(Bucket="models", Key="bert/config.json", Body=b"[]"))
        return examined

    monkeypatch.setattr(S3Source, "examine", examine_then_change)
    fetch(server, volume, keys)
    assert contents(volume, "model") == {**FILES, "config.json": b"[]"}


def fails(server, volume, keys, **arguments):
    with pytest.raises(FetchError) as caught:
        fetch(server, volume, keys, **arguments)
    assert SECRET_KEY not in str(caught.value)
    return caught.value


def test_missing_buckets_and_prefixes_are_not_found(server, bucket, volume, keys):
    assert fails(server, volume, keys, repo="s3://nobucket").reason is Reason.NOT_FOUND
    error = fails(server, volume, keys, repo="s3://models/ber")
    assert error.reason is Reason.NOT_FOUND
    assert "ber/" in str(error)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"aws_access_key_id": "x"}', '{"aws_access_key_id": 1}'])
def test_unusable_credentials_are_secret_missing(server, bucket, volume, keys, text):
    (keys / "s3_credentials.json").write_text(text)
    assert fails(server, volume, keys).reason is Reason.SECRET_MISSING


def test_a_store_that_is_not_there_is_unavailable(bucket, volume, keys):
    error = fails("http://127.0.0.1:9", volume, keys)
    assert error.reason is Reason.UNAVAILABLE


def test_unsafe_keys_are_refused(server, bucket, volume, keys):
    bucket.put_object(Bucket="models", Key="bert//etc/passwd", Body=b"x")
    assert fails(server, volume, keys).reason is Reason.INVALID_SOURCE
    fetch(server, volume, keys, allow_patterns=["*.json", "*.safetensors", "sub/*"])
    assert contents(volume, "model") == FILES
