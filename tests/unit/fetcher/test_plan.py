import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError
from modelcache_fetcher.plan import Listing, SourceFile, select


def listing(*paths):
    return Listing("main", "0" * 40, tuple(SourceFile(path, 10, "etag") for path in paths))


def test_every_file_says_why_it_is_in_or_out():
    files, skipped = select(listing("b.bin", "a.json", "c.txt"), ["*.json", "*.bin"], ["b.*"])
    assert [(file.path, file.why) for file in files] == [("a.json", "matches allowPatterns '*.json'")]
    assert [(file.path, file.why) for file in skipped] == [
        ("b.bin", "matches ignorePatterns 'b.*'"),
        ("c.txt", "matches none of allowPatterns"),
    ]


def test_nothing_left_is_not_found_and_names_what_is_near():
    with pytest.raises(FetchError, match=r"case-sensitive.*Model\.safetensors") as caught:
        select(listing("Model.safetensors", "x.json"), ["model.safetensors"], None)
    assert caught.value.reason is Reason.NOT_FOUND
    with pytest.raises(FetchError, match="leave out all 1 files"):
        select(listing("a"), [], ["*"])
    with pytest.raises(FetchError, match="no files at all"):
        select(listing(), [], [])


@pytest.mark.parametrize(
    "path", ["../a", "/etc/passwd", "a//b", "a/./b", "C:\\x", "a\x00b", "a\nb", "x" * 300, "\udcff"]
)
def test_unsafe_paths_are_refused_unless_they_are_left_out(path):
    with pytest.raises(FetchError) as caught:
        select(listing("ok.json", path), [], [])
    assert caught.value.reason is Reason.INVALID_SOURCE
    assert "ignorePatterns" in str(caught.value)
    files, _ = select(listing("ok.json", path), ["ok.json"], [])
    assert [file.path for file in files] == ["ok.json"]


def test_a_file_and_a_folder_of_one_name_are_refused():
    with pytest.raises(FetchError) as caught:
        select(listing("a", "a/b"), [], [])
    assert caught.value.reason is Reason.INVALID_SOURCE


def test_partial_files_of_other_states_are_never_continued():
    base = SourceFile("a", 10, "etag")
    others = [
        SourceFile("b", 10, "etag"),
        SourceFile("a", 11, "etag"),
        SourceFile("a", 10, "e"),
        SourceFile("a", 10, "etag", "v"),
    ]
    assert len({base.key, *(other.key for other in others)}) == 5
    assert base.key == SourceFile("a", 10, "etag").key
