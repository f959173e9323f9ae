"""Fetching from GCS: a real fake-gcs-server."""

import gzip
import json

import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, run_fetch
from modelcache_volume import Volume
from modelcache_volume.v1 import manifest_pb2
from support.fetching import contents, options, safetensors_bytes, spec
from support.object_stores import gcs_server, gcs_upload

BIG = safetensors_bytes({"a": 17 * 2**20, "b": 2**20 + 5})
FILES = {"config.json": b"{}", "model.safetensors": BIG, "sub/vocab.txt": b"a\nb\n"}


@pytest.fixture(scope="module")
def server():
    with gcs_server() as url:
        yield url


@pytest.fixture
def bucket(server, request):
    name = request.node.name.replace("_", "-").partition("[")[0][:60].strip("-")
    for path, content in FILES.items():
        gcs_upload(server, name, f"bert/{path}", content)
    return name


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


def fetch(server, volume, repo, **fields):
    return run_fetch(spec(repo, endpoint=server, **fields), volume, "model", options=options())


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_a_prefix_is_fetched_verified_and_nothing_beside_it(server, bucket, volume, scheme):
    gcs_upload(server, bucket, "bert_copy/config.json", b"other")
    gcs_upload(server, bucket, "bert/", b"")
    result = fetch(server, volume, f"{scheme}://{bucket}/bert")
    assert contents(volume, "model") == FILES
    (snapshot,) = Volume.open(volume).snapshots()
    assert snapshot.manifest.source.repo_id == f"gs://{bucket}/bert"
    for file in snapshot.manifest.files:
        assert file.verification == manifest_pb2.VERIFICATION_CRC32C
        assert file.verified_with.startswith("crc32c:")
    assert result.downloaded_bytes == result.bytes


def test_only_a_changed_object_is_fetched_again(server, bucket, volume):
    fetch(server, volume, f"gs://{bucket}/bert")
    assert fetch(server, volume, f"gs://{bucket}/bert").downloaded_bytes == 0
    gcs_upload(server, bucket, "bert/config.json", b"[1]")
    assert fetch(server, volume, f"gs://{bucket}/bert").downloaded_bytes == 3
    assert contents(volume, "model") == {**FILES, "config.json": b"[1]"}


@pytest.mark.parametrize("successor", [b"[1, 2]", b"[]"], ids=["of another size", "of the same size"])
@pytest.mark.parametrize("method", ["list_files", "examine"])
def test_an_object_replaced_between_plan_and_download_is_planned_anew(
    server, bucket, volume, monkeypatch, method, successor
):
    from modelcache_fetcher.sources.gcs import GcsSource

    real, changed = getattr(GcsSource, method), []

    def then_change(self, asked):
        answer = real(self, asked)
        if not changed:
            changed.append(gcs_upload(server, bucket, "bert/config.json", successor))
        return answer

    monkeypatch.setattr(GcsSource, method, then_change)
    fetch(server, volume, f"gs://{bucket}/bert")
    assert contents(volume, "model") == {**FILES, "config.json": successor}


def test_an_object_stored_compressed_arrives_as_it_is_stored(server, bucket, volume):
    stored = gzip.compress(b"[1, 2, 3]" * 1000)
    gcs_upload(server, bucket, "bert/config.json", stored, encoding="gzip")
    fetch(server, volume, f"gs://{bucket}/bert")
    assert contents(volume, "model") == {**FILES, "config.json": stored}


def test_names_that_need_quoting_arrive(server, bucket, volume):
    gcs_upload(server, bucket, "odd/a b/ü?#%2F.txt", b"1")
    fetch(server, volume, f"gs://{bucket}/odd")
    assert contents(volume, "model") == {"a b/ü?#%2F.txt": b"1"}


def test_missing_buckets_and_prefixes_are_not_found(server, bucket, volume):
    for repo in ("gs://no-such-bucket", f"gs://{bucket}/ber"):
        with pytest.raises(FetchError) as caught:
            fetch(server, volume, repo)
        assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("text", ["no json", "{}", json.dumps({"type": "service_account", "private_key": "SECRET"})])
def test_an_unusable_service_account_is_secret_missing(server, bucket, volume, tmp_path, text):
    (tmp_path / "service_account.json").write_text(text)
    with pytest.raises(FetchError) as caught:
        run_fetch(
            spec(f"gs://{bucket}/bert", endpoint=server, secret_ref={"name": "gcs"}),
            volume,
            "model",
            options=options(secrets_dir=tmp_path),
        )
    assert caught.value.reason is Reason.SECRET_MISSING
    assert "SECRET" not in str(caught.value)


def test_a_store_that_is_not_there_is_unavailable(volume):
    with pytest.raises(FetchError) as caught:
        fetch("http://127.0.0.1:9", volume, "gs://some-bucket/x")
    assert caught.value.reason is Reason.UNAVAILABLE
