"""repoId: every form has one canonical spelling, every mistake a sentence."""

import pytest

from modelcache_api.source import RepoId, is_commit, parse_repo_id


@pytest.mark.parametrize(
    ("text", "parsed", "canonical"),
    [
        (
            "google-bert/bert-base-uncased",
            RepoId("hf", "google-bert/bert-base-uncased"),
            "google-bert/bert-base-uncased",
        ),
        ("hf://org/name", RepoId("hf", "org/name"), "org/name"),
        ("gpt2", RepoId("hf", "gpt2"), "gpt2"),
        ("s3://bucket", RepoId("s3", "bucket"), "s3://bucket"),
        ("s3://bucket/", RepoId("s3", "bucket"), "s3://bucket"),
        ("s3://my.bucket/a/b/", RepoId("s3", "my.bucket", "a/b"), "s3://my.bucket/a/b"),
        ("gcs://my_bucket/a b", RepoId("gs", "my_bucket", "a b"), "gs://my_bucket/a b"),
        ("gs://bucket/a%20b", RepoId("gs", "bucket", "a%20b"), "gs://bucket/a%20b"),
        ("file:///models//bert/../minilm/", RepoId("file", "/models/minilm"), "file:///models/minilm"),
    ],
)
def test_forms(text, parsed, canonical):
    assert parse_repo_id(text) == parsed
    assert parsed.canonical == canonical
    assert parse_repo_id(canonical) == parsed


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("org/name@v1", "write repoId: org/name and revision: v1"),
        ("a/b/c", "is no repo"),
        ("/models/bert", "file:///folder"),
        ("./bert", "looks like a folder"),
        ("../bert", "looks like a folder"),
        ("a--b/c", "cannot contain"),
        ("org/..", "is no repo"),
        ("org/na me", "is no repo"),
        ("org/", "is no repo"),
        ("", "is no repo"),
        ("x" * 97, "is no repo"),
        ("https://huggingface.co/org/name", "in endpoint"),
        ("azure://x/y", "unknown scheme"),
        ("s3://Bucket/x", "no valid bucket"),
        ("s3://ab", "no valid bucket"),
        ("s3:///x", "no valid bucket"),
        ("s3://bucket/a//b", "part in its prefix"),
        ("s3://bucket/../b", "part in its prefix"),
        ("file://models", "three slashes"),
        ("file:///", "root folder"),
        ("file:///a/..", "root folder"),
        ("s3://bucket/a\nb", "control character"),
        ("org/na\x00me", "control character"),
    ],
)
def test_mistakes(text, part):
    with pytest.raises(ValueError, match=part.replace("(", r"\(")):
        parse_repo_id(text)


def test_a_commit_is_forty_lower_case_hex_digits():
    assert is_commit("0123456789abcdef0123456789abcdef01234567")
    assert not is_commit("main")
    assert not is_commit("0123456789abcdef0123456789abcdef0123456")
