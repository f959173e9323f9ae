"""Repos that mean harm: each is refused with its reason, or harmless."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, run_fetch
from modelcache_volume import NoActiveRevision, Volume
from support.fake_hub import fake_hub
from support.fetching import contents, options, safetensors_bytes, spec


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "deep" / "below" / "volume"


def fetch(hub, volume, files, **fields):
    hub.commit("org/name", {"config.json": b"{}", **files})
    return run_fetch(spec("org/name", endpoint=hub.url, **fields), volume, "model", options=options())


def refused(hub, volume, files, **fields):
    with pytest.raises(FetchError) as caught:
        fetch(hub, volume, files, **fields)
    with pytest.raises(NoActiveRevision):
        Volume.open(volume).active("model")
    assert Volume.open(volume).snapshots() == []
    return caught.value


PATHS = {
    "parent folder": "../escaped",
    "parent folder inside": "a/../../escaped",
    "absolute": "/tmp/escaped",
    "backslash": "a\\..\\..\\escaped",
    "drive": "C:/escaped",
    "NUL": "a\x00b",
    "newline": "a\nb",
    "escape sequence": "a\x1b[2Jb",
    "right to left": "model\u202esrosnetefas.py",
    "empty component": "a//b",
    "dot": "./config2.json",
    "300 bytes": "n" * 300,
    "2000 bytes": "/".join(["n" * 99] * 20),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_names_that_escape_or_cannot_be_stored_are_refused(hub, volume, tmp_path, path):
    error = refused(hub, volume, {path: b"evil"})
    assert error.reason is Reason.INVALID_SOURCE
    assert str(error).isprintable()
    assert not list(tmp_path.rglob("escaped*"))


def test_a_name_that_is_file_and_folder_is_refused(hub, volume):
    assert refused(hub, volume, {"a": b"1", "a/b": b"2"}).reason is Reason.INVALID_SOURCE


@pytest.mark.parametrize("path", ["CON", "aux.json", "dev/null", "proc/self/mem", ".git/config", "-rf", "$(reboot)"])
def test_device_and_option_names_are_just_names(hub, volume, path):
    fetch(hub, volume, {path: b"1"})
    assert contents(volume, "model")[path] == b"1"


def test_names_that_differ_in_case_are_two_files(hub, volume):
    fetch(hub, volume, {"Model.json": b"1", "model.json": b"2"})
    assert contents(volume, "model") == {"config.json": b"{}", "Model.json": b"1", "model.json": b"2"}


def test_a_name_that_looks_like_a_partial_file_or_log_is_harmless(hub, volume):
    files = {"hub/x/incoming/k.part": b"1", "k.log.part": b"2", "FORMAT": b"99"}
    fetch(hub, volume, files)
    assert contents(volume, "model") == {"config.json": b"{}", **files}


GOOD = safetensors_bytes({"a": 64})


def header(document, data=b""):
    encoded = json.dumps(document).encode() if not isinstance(document, bytes) else document
    return struct.pack("<Q", len(encoded)) + encoded + data


TENSOR = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
SAFETENSORS = {
    "empty": b"",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64-1 bytes": b"\xff" * 8 + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "no JSON": header(b"{" * 1000),
    "deep JSON": header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "negative offsets": header({"a": {**TENSOR, "data_offsets": [-8, 0]}}, b"8" * 8),
    "offsets beyond the file": header({"a": {**TENSOR, "data_offsets": [0, 2**62]}}, b"8" * 8),
    "overlap": header({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, b"8" * 12),
    "hole": header({"a": TENSOR}, b"8" * 16),
    "huge shape": header({"a": {**TENSOR, "shape": [2**40, 2**40]}}, b"8" * 8),
    "unknown dtype": header({"a": {**TENSOR, "dtype": "EVIL"}}, b"8" * 8),
    "same name twice": header(b'{"a":' + json.dumps(TENSOR).encode() + b',"a":' + json.dumps(TENSOR).encode() + b"}"),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_malformed_safetensors_are_bad_weights(hub, volume, content):
    error = refused(hub, volume, {"model.safetensors": content})
    assert error.reason is Reason.BAD_WEIGHTS
    assert "model.safetensors" in str(error)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def torch_bytes(value, **how):
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def zip_of(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_calls_os_system_is_refused_and_not_run(hub, volume, tmp_path, legacy):
    made = tmp_path / "made"
    content = torch_bytes({"w": torch.ones(2), "x": Evil(made)}, _use_new_zipfile_serialization=not legacy)
    error = refused(hub, volume, {"pytorch_model.bin": content})
    assert error.reason is Reason.BAD_WEIGHTS
    assert "system" in str(error)
    assert not made.exists()


def test_a_bare_pickle_is_refused_and_not_run(hub, volume, tmp_path):
    made = tmp_path / "made"
    error = refused(hub, volume, {"pytorch_model.bin": pickle.dumps(Evil(made))})
    assert error.reason is Reason.BAD_WEIGHTS
    assert not made.exists()


BINS = {
    "zip bomb": zip_of({"archive/data.pkl": b"\0" * 200_000_000}, zipfile.ZIP_DEFLATED),
    "zip of another program": zip_of({"../../escaped": b"evil"}),
    "cut zip": torch_bytes({"w": torch.ones(1000)})[:-100],
    "endless pickle": zip_of({"archive/data.pkl": b"\x80\x02" + b"]" * 100_000}),
    "empty": b"",
    "text": b"<html>Not found</html>",
}


@pytest.mark.parametrize("content", BINS.values(), ids=BINS.keys())
def test_malformed_checkpoints_are_bad_weights(hub, volume, content):
    error = refused(hub, volume, {"pytorch_model.bin": content})
    assert error.reason is Reason.BAD_WEIGHTS
    assert "pytorch_model.bin" in str(error)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_sound_checkpoint_is_indexed(hub, volume, legacy):
    weight = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"w": weight, "tied": weight, "turned": weight.t()}
    fetch(hub, volume, {"pytorch_model.bin": torch_bytes(state, _use_new_zipfile_serialization=not legacy)})
    (snapshot,) = Volume.open(volume).snapshots()
    tensors = {tensor.name: tensor for tensor in snapshot.manifest.tensors}
    assert set(tensors) == {"w", "tied", "turned"}
    assert tensors["w"].offset == tensors["tied"].offset
    assert list(tensors["turned"].strides) == [1, 6]


INDEXES = {
    "a shard outside": {"weight_map": {"a": "../../../etc/passwd"}},
    "a shard that is missing": {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}},
    "a tensor that is missing": {"weight_map": {"a": "model.safetensors", "zz": "model.safetensors"}},
    "no map": {"metadata": {}},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_a_lying_index_is_bad_weights(hub, volume, index):
    files = {"model.safetensors": GOOD, "model.safetensors.index.json": json.dumps(index).encode()}
    assert refused(hub, volume, files, allow_patterns=["*"]).reason is Reason.BAD_WEIGHTS


def test_what_is_left_out_by_pattern_does_no_harm(hub, volume):
    files = {"../escaped": b"evil", "pytorch_model.bin": pickle.dumps(Evil("x")), "model.safetensors": GOOD}
    fetch(hub, volume, files, ignore_patterns=["*escaped", "*.bin"])
    assert sorted(contents(volume, "model")) == ["config.json", "model.safetensors"]


def test_a_folder_whose_names_are_no_utf8_is_refused_unless_left_out(volume, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    with open(os.fsencode(folder) + b"/\xff\xfe.json", "wb"):  # noqa: PTH123 - no Path of such bytes
        pass
    source = f"file://{folder}"
    with pytest.raises(FetchError) as caught:
        run_fetch(spec(source), volume, "model", options=options())
    assert caught.value.reason is Reason.INVALID_SOURCE
    str(caught.value).encode()
    run_fetch(spec(source, allow_patterns=["config.json"]), volume, "model", options=options())
    assert contents(volume, "model") == {"config.json": b"{}"}


@pytest.mark.parametrize("scheme", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)"])
def test_a_redirect_to_something_else_than_http_is_not_followed(hub, volume, scheme):
    hub.fault("*/resolve/*", times=-1, status=302, headers={"Location": scheme})
    error = refused(hub, volume, {})
    assert error.reason is Reason.UNAVAILABLE
    assert "root:" not in str(error)


def test_a_redirect_loop_ends(hub, volume):
    hub.fault("*/resolve/*", times=-1, status=302, headers={"Location": "?again"})
    assert refused(hub, volume, {}).reason is Reason.UNAVAILABLE
