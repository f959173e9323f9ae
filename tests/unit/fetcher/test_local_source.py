import os

import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError
from modelcache_fetcher.sources.local import LocalSource


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "sub" / "vocab.txt").write_text("a")
    return root


def paths(folder):
    return [file.path for file in LocalSource(str(folder)).list_files(None).files]


def refused(folder, match):
    with pytest.raises(FetchError, match=match) as caught:
        LocalSource(str(folder)).list_files(None)
    return caught.value.reason


def test_lists_files_below_all_folders(folder):
    assert paths(folder) == ["config.json", "sub/vocab.txt"]


def test_its_revision_changes_with_any_file_and_only_then(folder):
    first = LocalSource(str(folder)).list_files(None).commit
    assert first == LocalSource(str(folder)).list_files(None).commit
    assert len(bytes.fromhex(first)) == 20
    os.utime(folder / "config.json", ns=(1, 1))
    touched = LocalSource(str(folder)).list_files(None).commit
    (folder / "sub" / "vocab.txt").rename(folder / "sub" / "vocab2.txt")
    assert len({first, touched, LocalSource(str(folder)).list_files(None).commit}) == 3


def test_symlinks_inside_the_folder_are_followed(folder):
    (folder / "link.json").symlink_to("config.json")
    assert "link.json" in paths(folder)


def test_symlinks_that_leave_the_folder_are_refused(folder):
    (folder.parent / "secret").write_text("x")
    (folder / "link").symlink_to("../secret")
    assert refused(folder, "leaves the folder") is Reason.INVALID_SOURCE


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_dangling_and_circular_symlinks_are_refused(folder, target):
    (folder / "link").symlink_to(target)
    assert refused(folder, "leads nowhere") is Reason.INVALID_SOURCE


def test_linked_folders_and_pipes_are_refused(folder):
    (folder / "loop").symlink_to(".")
    assert refused(folder, "no regular file") is Reason.INVALID_SOURCE
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    assert refused(folder, "no regular file") is Reason.INVALID_SOURCE


def test_a_missing_folder_is_not_found_and_a_file_is_no_folder(folder):
    assert refused(folder / "missing", "does not exist") is Reason.NOT_FOUND
    assert refused(folder / "config.json", "is no folder") is Reason.INVALID_SOURCE


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(FetchError, match="no revisions"):
        LocalSource(str(folder)).list_files("main")


@pytest.fixture
def cached_repo(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (repo / "blobs" / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/1234")
    (repo / "refs").mkdir()
    return repo


def test_a_hugging_face_cache_works_by_repo_and_by_snapshot(cached_repo):
    assert paths(cached_repo) == ["config.json", "sub/config.json"]
    assert paths(cached_repo / "snapshots" / ("a" * 40)) == ["config.json", "sub/config.json"]


def test_of_several_cached_snapshots_main_is_taken(cached_repo):
    other = cached_repo / "snapshots" / ("b" * 40)
    other.mkdir()
    (other / "only.json").symlink_to("../../blobs/1234")
    assert refused(cached_repo, "without refs/main") is Reason.NOT_FOUND
    (cached_repo / "refs" / "main").write_text("b" * 40)
    assert paths(cached_repo) == ["only.json"]


def test_a_cache_whose_links_leave_its_blobs_is_refused(cached_repo):
    (cached_repo.parent / "other").write_text("x")
    (cached_repo / "snapshots" / ("a" * 40) / "x").symlink_to(cached_repo.parent / "other")
    assert refused(cached_repo, "leaves the folder") is Reason.INVALID_SOURCE
