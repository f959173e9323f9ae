from pathlib import Path

import pytest

from modelcache_volume import InvalidPath, SnapshotNotFound, source_folder
from modelcache_volume.layout import Layout, bucket_name


def test_a_hub_repo_lies_where_the_hugging_face_cache_looks_for_it():
    assert source_folder("google-bert/bert-base-uncased") == "models--google-bert--bert-base-uncased"
    assert source_folder("gpt2") == "models--gpt2"
    assert source_folder("org/name", "https://mirror.example") == source_folder("org/name")


def test_no_two_buckets_share_a_folder():
    folders = {
        source_folder("s3://b/x"),
        source_folder("s3://b-x"),
        source_folder("gs://b/x"),
        source_folder("s3://b/x", "http://minio:9000"),
        source_folder("s3://b/ä"),
        source_folder("s3://b/ö"),
        source_folder("file:///b/x"),
        source_folder("s3://" + "b" * 300),
        source_folder("s3://" + "b" * 300 + "/c"),
    }
    assert len(folders) == 9
    assert all(len(folder) <= 120 and Layout(Path("/v")).source(folder) for folder in folders)


def test_spellings_of_one_bucket_share_a_folder():
    assert source_folder("gcs://b/x/") == source_folder("gs://b/x")
    assert source_folder("s3://b", "http://minio:9000/") == source_folder("s3://b", "http://minio:9000")
    assert source_folder("s3://bucket/some/prefix").startswith("buckets--s3--bucket-some-prefix-")


@pytest.mark.parametrize("repo_id", ["", "..", "a/../b", "a/b/c", "org/na me", "a--b/c", "ftp://x/y", "s3://", "org/"])
def test_what_is_no_source_has_no_folder(repo_id):
    with pytest.raises(InvalidPath):
        source_folder(repo_id)


def test_only_buckets_have_a_link_in_model_cache():
    assert bucket_name("org/name") == ""
    assert bucket_name("s3://bucket/a/b") == "bucket"
    assert bucket_name("file:///data/models/bert") == "bert"
    assert bucket_name("file:///") == "root"


def test_names_from_outside_never_become_paths_elsewhere():
    layout = Layout(Path("/v"))
    with pytest.raises(InvalidPath):
        layout.active("../x")
    with pytest.raises(InvalidPath):
        layout.lease("0" * 64, "../../x")
    with pytest.raises(InvalidPath):
        layout.part("models--a--b", "a/b")
    with pytest.raises(InvalidPath):
        layout.commit("models--a--b", "..")
    with pytest.raises(SnapshotNotFound):
        layout.manifest("models--a--b", "../../FORMAT")
    with pytest.raises(SnapshotNotFound):
        layout.manifest("models--a--b", "0" * 63 + "G")
