import pytest

from modelcache_volume import InvalidPath, refuse_clashes, validate_path


@pytest.mark.parametrize(
    "path",
    ["config.json", "a/b/c.txt", "…/ü", "שלום/مرحبا", "👩\u200d💻", ".gitattributes", "a..b", "-x", "ab:c", "x" * 255],
)
def test_ordinary_paths_pass_unchanged(path):
    assert validate_path(path) == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("a/./x", "'.'"),
        ("a//x", "''"),
        ("a/", "''"),
        ("a\\..\\x", "backslash"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\x85b", "control"),
        ("a\u202egnp.exe", "control"),
        ("a\u2067b", "control"),
        ("a\u2028b", "control"),
        ("C:/x", "drive"),
        ("c:x", "drive"),
        ("x" * 256, "255"),
        ("ü" * 128, "255"),
        ("/".join(["abcdefg"] * 129), "1024"),
        ("bad\udcff", "UTF-8"),
    ],
)
def test_a_path_that_could_leave_its_folder_or_not_be_stored_is_refused_with_its_reason(path, reason):
    with pytest.raises(InvalidPath, match=reason):
        validate_path(path)


def test_files_and_folders_of_one_name_are_refused():
    with pytest.raises(InvalidPath, match="needs a folder"):
        refuse_clashes(["a/b/c", "x", "a/b"])
    with pytest.raises(InvalidPath, match="twice"):
        refuse_clashes(["a", "b", "a"])
    refuse_clashes(["a/b", "a/c", "ab", "a.b", "b/a"])
