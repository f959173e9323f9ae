"""What somebody who writes a manifest is told, with file and line."""

import textwrap
from pathlib import Path

import pytest

from modelcache_api.load import ManifestError, load_manifest

GOOD = """\
apiVersion: modelcache.io/v1alpha1
kind: ModelCache
metadata:
  name: minilm
spec:
  repoId: org/name
"""


@pytest.fixture
def refused(tmp_path):
    """Loads a text and returns the lines of the refusal, without the file's name."""

    def load(text: str | bytes) -> list[str]:
        file = tmp_path / "mc.yaml"
        file.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        with pytest.raises(ManifestError) as caught:
            load_manifest(file)
        lines = str(caught.value).splitlines()
        assert all(line.startswith(str(file)) for line in lines)
        return [line.removeprefix(str(file)).removeprefix(":").strip() for line in lines]

    return load


def loaded(tmp_path: Path, text: str):
    file = tmp_path / "mc.yaml"
    file.write_text(text)
    return load_manifest(file)


def test_a_minimal_manifest_gets_every_default(tmp_path):
    model = loaded(tmp_path, GOOD)
    assert model.metadata.name == "minilm"
    assert model.spec.requested_revision == "main"
    assert model.spec.storage.access_modes == ["ReadWriteOnce"]
    assert model.spec.server.replicas == 1
    assert model.spec.fetch.stall_timeout == "5m"
    assert model.spec.revision_history_limit == 1


def test_json_is_read_as_well(tmp_path):
    text = '{"apiVersion":"modelcache.io/v1alpha1","kind":"ModelCache","metadata":{"name":"a"},"spec":{"repoId":"a/b"}}'
    assert loaded(tmp_path, text).spec.repo_id == "a/b"


def test_a_field_set_to_null_takes_its_default(tmp_path):
    assert loaded(tmp_path, GOOD + "  storage: null\n  revision:\n").spec.storage.reclaim_policy == "Delete"


def test_what_kubectl_get_prints_is_read(tmp_path):
    text = GOOD.replace("  name: minilm\n", "  name: minilm\n  uid: x\n  managedFields: [{a: b}]\n  generation: 2\n")
    status = "status:\n  surprise: 1\n  conditions: 7\n"
    assert loaded(tmp_path, text + status).metadata.generation == 2


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("  repoID: a/b", "7: spec.repoID: unknown field; did you mean repoId?"),
        ("  repo_id: a/b", "7: spec.repo_id: unknown field; did you mean repoId?"),
        ("  alowPatterns: []", "7: spec.alowPatterns: unknown field; did you mean allowPatterns?"),
        ("  replicas: 2", "7: spec.replicas: unknown field; did you mean spec.server.replicas?"),
        ("  server:\n    cachesize: 1Gi", "8: spec.server.cachesize: unknown field; did you mean cacheSize?"),
        (
            "  server:\n    tolerations:\n    - {opertor: Exists}",
            "9: spec.server.tolerations[0].opertor: unknown field; did you mean operator?",
        ),
        ("  suspend: true\n  suspend: false", "8: spec.suspend: stands twice; the first is in line 7"),
        ("  revision: 123", "7: spec.revision: must be text, not the number 123; put it in quotes"),
        ("  revision: 2024-01-01", "7: spec.revision: must be text, not 2024-01-01; put it in quotes"),
        ("  suspend: yes please", '7: spec.suspend: must be true or false, not "yes please"'),
        ("  allowPatterns: '*.json'", '7: spec.allowPatterns: must be a list, not "*.json"'),
        ("  server: 3", "7: spec.server: must be a mapping of fields, not the number 3"),
        ("  server: {replicas: -1}", "7: spec.server.replicas: must be 0 or more, not the number -1"),
        ("  server: {replicas: '1'}", '7: spec.server.replicas: must be a whole number, not "1"'),
        (
            "  server: {access: {mode: open}}",
            "7: spec.server.access.mode: must be 'Open' or 'Token', not \"open\"",
        ),
        ("  refresh: {}", "7: spec.refresh.interval: is missing and has no default"),
        (
            "  allowPatterns: ['']",
            '7: spec.allowPatterns[0]: a pattern cannot be empty; write one such as "*.safetensors"',
        ),
    ],
)
def test_a_problem_names_line_field_and_what_to_write(refused, addition, expected):
    assert refused(GOOD + addition + "\n") == [expected]


def test_a_field_like_no_other_is_answered_with_what_there_is(refused):
    (line,) = refused(GOOD + "  zzz: 1\n")
    assert line.startswith("7: spec.zzz: unknown field; spec takes repoId, revision, allowPatterns")


def test_all_problems_are_told_at_once_in_the_order_of_lines(refused):
    lines = refused(GOOD.replace("minilm", "Mini_LM").replace("repoId", "repoID") + "  server: {replicas: x, foo: 1}\n")
    assert [line.split(":")[0] for line in lines] == ["4", "5", "6", "7", "7"]
    assert "such as 'mini-lm'" in lines[0]
    assert lines[1].startswith("5: spec.repoId: is missing; write where the model is")


def test_a_rule_between_fields_stands_at_the_field_to_change(refused):
    (line,) = refused(GOOD.replace("org/name", "s3://bucket/x") + "  revision: main\n")
    assert line.startswith("7: spec.revision: only a Hugging Face repo has revisions")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no ModelCache: the file is empty"),
        ("---\n# nothing\n---\n", "holds no ModelCache: the file is empty"),
        ("- a\n", "1: holds a list, not a ModelCache"),
        ("kind: Deployment\n", "1: kind: is Deployment; this command reads a ModelCache"),
        ("apiVersion: v1\nkind: ModelCache\n", "1: apiVersion: is 'v1'; write modelcache.io/v1alpha1"),
        ("kind: ModelCache\n", "1: apiVersion: is missing; write modelcache.io/v1alpha1"),
        (GOOD + "---\n" + GOOD, "8: a second document begins here; give one ModelCache in one file"),
        (b"\xff\xfe", "is no UTF-8 text (byte 0); save it as UTF-8"),
        ("a: b: c\n", "1: is no valid YAML: mapping values are not allowed here"),
        ("a: [1\n", "2: is no valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"),
        ("? [a]\n: b\n", "1: a field's name must be a word, not a list or mapping"),
        ("a: 2024-13-01\n", "1: '2024-13-01' is no valid value: month must be in 1..12; put it in quotes"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "3: merge keys (<<) are not read; write the fields out"),
    ],
)
def test_what_is_no_manifest_is_said_to_be_none(refused, text, expected):
    assert refused(text) == [expected]


def test_python_objects_are_refused_not_made(refused, tmp_path):
    (line,) = refused(f"a: !!python/object/apply:os.system ['touch {tmp_path}/made']\n")
    assert "is not read; take it away" in line
    assert not (tmp_path / "made").exists()


def test_a_small_file_that_means_billions_of_values_is_refused_quickly(refused):
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    rows += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (line,) = refused("\n".join(rows))
    assert "too many values" in line


def test_a_value_that_holds_itself_is_refused(refused):
    (line,) = refused("a: &a [*a]\n")
    assert "too many values" in line


def test_deep_nesting_is_refused(refused):
    (line,) = refused("[" * 5000)
    assert "nested deeper than 64 levels" in line


def test_a_huge_file_is_refused(refused):
    (line,) = refused("a: " + "x" * 2**20 + "\n")
    assert "larger than 1024 KiB" in line


def test_a_missing_file_a_folder_and_an_unreadable_path_are_sentences(tmp_path):
    with pytest.raises(ManifestError, match="there is no such file"):
        load_manifest(tmp_path / "none.yaml")
    with pytest.raises(ManifestError, match="is a folder; name a file"):
        load_manifest(tmp_path)
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path / ("x" * 300))


def test_a_relative_folder_is_taken_from_the_manifests_place(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = loaded(tmp_path, GOOD.replace("org/name", "file://./models/bert"))
    assert model.spec.repo_id == f"file://{tmp_path}/models/bert"
    model = loaded(tmp_path, GOOD.replace("org/name", "file://../bert"))
    assert model.spec.repo_id == f"file://{tmp_path.parent}/bert"
