from huggingface_hub.utils import filter_repo_objects

from modelcache_fetcher.patterns import first_match, nearest_names

PATHS = [
    "model.safetensors",
    "onnx/model.onnx",
    "a/b/config.json",
    "README.md",
    "Model.SafeTensors",
    "dir/x",
    "[x].txt",
]
PATTERNS = ["*", "*.json", "onnx/", "a/*", "*.[sm]*", "README.??", "dir", "a\\b\\*", "[[]x].txt", "model.*"]


def test_matches_exactly_what_huggingface_hub_matches():
    for pattern in PATTERNS:
        ours = [path for path in PATHS if first_match(path, [pattern])]
        assert ours == list(filter_repo_objects(PATHS, allow_patterns=[pattern])), pattern


def test_says_which_pattern_matched_as_the_user_wrote_it():
    assert first_match("onnx/model.onnx", ["*.json", "onnx/"]) == "onnx/"
    assert first_match("onnx/model.onnx", ["*.json"]) is None


def test_nearest_names_show_case_slips_and_endings_first():
    assert nearest_names(PATHS, ["readme.md"])[0] == "README.md"
    assert nearest_names(PATHS, ["weights/*.onnx"])[0] == "onnx/model.onnx"
    assert len(nearest_names([f"f{i}" for i in range(50)], ["zzz"])) == 5
