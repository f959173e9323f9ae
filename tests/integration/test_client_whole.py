"""Weights and files in one go."""

import errno
import functools
import hashlib
import io
import os
import re
import time

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import modelcache
from modelcache import FileNotInSnapshot, IntegrityError, UnsupportedModel
from modelcache_volume import Volume
from support.client_server import FaultyServer
from support.models import TINY, BertFiles, minilm, save_bert
from support.serving import ServerProcess, fetch_folder


@pytest.fixture
def folder(tmp_path):
    return save_bert(tmp_path / "model", BertFiles(data_offset=8, shards=2))


@pytest.fixture
def server(folder):
    with FaultyServer(folder) as server:
        yield server


def test_the_state_dict_is_what_is_in_the_files(server, folder):
    state = modelcache.load_state_dict("x", address=server.address)
    wanted = {}
    for path in folder.glob("*.safetensors"):
        wanted.update(safetensors.torch.load_file(path))
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


# Those that torch does not make from numbers are looked at as bytes.
NUMBERS = ("float64", "float32", "float16", "bfloat16", "complex64", "int64", "int32", "int16", "int8", "uint64",
           "uint32", "uint16", "uint8", "bool")  # fmt: skip
BYTES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")


@pytest.mark.parametrize("volume", [False, True], ids=["over the wire", "from the volume"])
def test_every_dtype_of_safetensors_loads(tmp_path, monkeypatch, volume):
    source = torch.arange(24, dtype=torch.uint8).view(2, 12)
    wanted = {name: source.to(getattr(torch, name)) for name in NUMBERS}
    wanted |= {name: source.clone().view(getattr(torch, name)) for name in BYTES}
    wanted |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7)}
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file(wanted, folder / "model.safetensors")
    fetch_folder(folder, tmp_path / "volume", "all")
    monkeypatch.setenv("MODELCACHE_VOLUME", str(tmp_path / "volume") if volume else "off")
    with ServerProcess.over(tmp_path / "volume") as server:
        state = modelcache.load_state_dict("all", address=server.address)
    for name, value in safetensors.torch.load_file(folder / "model.safetensors").items():
        assert (
            (state[name].dtype, state[name].shape)
            == (value.dtype, value.shape)
            == (
                wanted[name].dtype,
                wanted[name].shape,
            )
        )
        assert torch.equal(state[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("connections", "error"), [(0, ValueError), ("2", TypeError), (True, TypeError), (None, TypeError)]
)
def test_a_number_of_connections_that_makes_no_sense_is_refused(connections, error):
    with pytest.raises(error, match=f"connections must be at least 1; it was given {connections!r}"):
        modelcache.load_state_dict("x", address="127.0.0.1:1", connections=connections)


def test_a_loaded_model_is_the_one_of_from_pretrained_and_can_be_trained(server, folder):
    ids = torch.arange(12).view(1, 12)
    model = modelcache.from_pretrained("AutoModel", "x", address=server.address)
    assert torch.equal(model(ids).pooler_output, BertModel.from_pretrained(folder)(ids).pooler_output)
    model(ids).pooler_output.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None


def test_a_whole_load_is_interrupted_by_nothing_less_than_damage(server):
    server.cut_after, server.cuts = 20_000, 5
    modelcache.load_state_dict("x", address=server.address)
    assert server.cuts < 5
    tensor = server.manifests[server.active].tensors[3]
    server.flips = {tensor.offset: 10}
    with pytest.raises(IntegrityError):
        modelcache.load_state_dict("x", address=server.address)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("volume", [False, True], ids=["over the wire", "from the volume"])
def test_a_whole_load_shows_its_progress_on_a_terminal_and_nowhere_else(tmp_path, folder, monkeypatch, volume):
    fetch_folder(folder, tmp_path / "volume", "bert")
    monkeypatch.setenv("MODELCACHE_VOLUME", str(tmp_path / "volume") if volume else "off")

    def shown(stream, call, **options):
        monkeypatch.setattr("sys.stderr", stream)
        call(name="bert", address=server.address, **options)
        return stream.getvalue()

    loads = (modelcache.load_state_dict, functools.partial(modelcache.from_pretrained, "AutoModel"))
    with ServerProcess.over(tmp_path / "volume") as server:
        for call in loads:
            for progress in (None, True):
                assert re.search(r"bert: 100%.*\d+kB?/\d+kB? ", shown(Terminal(), call, progress=progress))
            assert "bert: 100%" in shown(io.StringIO(), call, progress=True)
            assert shown(io.StringIO(), call) == ""
            assert shown(Terminal(), call, progress=False) == ""


def test_a_stream_shows_nothing(server, monkeypatch, capfd):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    with modelcache.StreamingBertModel("x", 1, address=server.address) as model:
        model(torch.arange(12).view(1, 12))
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_tensors_at_odd_offsets_of_an_old_checkpoint_are_equal_from_volume_and_wire(tmp_path, monkeypatch):
    """Before torch 1.6 a file had no alignment: mapped, its tensors would lie where no kernel expects them."""
    model = tmp_path / "model"
    model.mkdir()
    torch.manual_seed(0)
    plain = BertModel(BertConfig(**TINY)).eval()
    (model / "config.json").write_text(plain.config.to_json_string())
    state, padding = plain.state_dict(), ""
    # What comes before the tensors holds addresses of this process, in decimals: it is as long as it happens to be.
    while not padding or (model / "pytorch_model.bin").stat().st_size % 4 == 0:
        padding += "x"
        state._metadata["padding"] = padding
        torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    fetch_folder(model, tmp_path / "volume", "bert")
    (snapshot,) = Volume.open(tmp_path / "volume").snapshots()
    assert any(tensor.offset % 4 for tensor in snapshot.manifest.tensors)
    ids = torch.arange(12).view(1, 12)
    with ServerProcess.over(tmp_path / "volume") as server, torch.no_grad():
        for lane in ("volume", "http"):
            monkeypatch.setenv("MODELCACHE_VOLUME", str(tmp_path / "volume") if lane == "volume" else "off")
            state = modelcache.load_state_dict("bert", address=server.address)
            for name, value in plain.state_dict().items():
                assert torch.equal(state[name], value)
                assert state[name].data_ptr() % 64 == 0
            with modelcache.StreamingBertModel("bert", 1, address=server.address) as streamed:
                assert torch.equal(streamed(ids).pooler_output, plain(ids).pooler_output)
                assert streamed.get_inference_stats()["lane"] == lane


def test_tokenizer_and_config_come_over_the_wire(tmp_path):
    with FaultyServer(minilm()) as server:
        folder = modelcache.snapshot(
            "x", allow_patterns=["*.json", "*.txt"], address=server.address, local_dir=tmp_path / "files"
        )
    assert not (folder / "model.safetensors").exists()
    text = "streamed while it computes"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(minilm())(text)


def test_a_snapshot_holds_the_same_bytes_and_is_not_read_twice(server, folder, tmp_path):
    target = tmp_path / "files"
    modelcache.snapshot("x", address=server.address, local_dir=target)
    for path in folder.iterdir():
        assert hashlib.sha256((target / path.name).read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    before = len(server.requests)
    modelcache.snapshot("x", address=server.address, local_dir=target)
    assert len(server.requests) == before
    (target / "config.json").write_text("{}")
    modelcache.snapshot("x", address=server.address, local_dir=target)
    assert (target / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("volume", [False, True], ids=["over the wire", "from the volume"])
def test_a_full_disk_is_said_and_leaves_nothing_half(small_disk, tmp_path, monkeypatch, volume):
    folder = tmp_path / "large"
    folder.mkdir()
    safetensors.torch.save_file({"one": torch.rand(2**19)}, folder / "model.safetensors")
    fetch_folder(folder, tmp_path / "volume", "large")
    monkeypatch.setenv("MODELCACHE_VOLUME", str(tmp_path / "volume") if volume else "off")
    disk = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 2**20))
    target = small_disk / "files"
    with (
        ServerProcess.over(tmp_path / "volume") as server,
        pytest.raises(OSError, match=rf"model\.safetensors \(2 MiB\) .*{target}.*local_dir=") as caught,
    ):
        modelcache.snapshot("large", address=server.address, local_dir=target)
    assert caught.value.errno == errno.ENOSPC
    assert list(target.iterdir()) == []


def test_a_damaged_file_is_not_left_behind(server, tmp_path):
    server.flips = {10: 10**6}
    with pytest.raises(IntegrityError, match=r"config\.json"):
        modelcache.snapshot("x", allow_patterns="config.json", address=server.address, local_dir=tmp_path / "files")
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize("http", [True, False], ids=["http", "grpc"])
@pytest.mark.parametrize("whole", [modelcache.load_state_dict, modelcache.snapshot])
def test_what_takes_longer_than_the_timeout_is_read_as_long_as_it_comes(tmp_path, monkeypatch, http, whole):
    monkeypatch.setattr("modelcache.deadline.PORTION_BYTES", 2**20)
    monkeypatch.setenv("MODELCACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "large"
    folder.mkdir()
    safetensors.torch.save_file({"one": torch.rand(7 * 2**18)}, folder / "model.safetensors")
    with FaultyServer(folder) as server:
        server.http, server.seconds_per_mib = http, 0.3
        started = time.monotonic()
        found = whole("test", address=server.address, timeout=1.5)
    assert time.monotonic() - started > 1.5
    if whole is modelcache.snapshot:
        found = safetensors.torch.load_file(found / "model.safetensors")
    assert torch.equal(found["one"], safetensors.torch.load_file(folder / "model.safetensors")["one"])


@pytest.mark.parametrize("patterns", [{"allow_patterns": ["*.gguf"]}, {"ignore_patterns": "*"}])
def test_patterns_that_match_nothing_are_an_error(server, patterns):
    given = "|".join(re.escape(f"{name}={value!r}") for name, value in patterns.items())
    with pytest.raises(FileNotInSnapshot, match=rf"({given}).* config\.json"):
        modelcache.snapshot("x", **patterns, address=server.address)


def test_a_pattern_that_ends_in_a_slash_is_a_folder_as_for_the_hub(tmp_path):
    folder = save_bert(tmp_path / "model", BertFiles())
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("x")
    with FaultyServer(folder) as server:
        given = {"address": server.address, "allow_patterns": ["onnx/", "config.json"]}
        found = modelcache.snapshot("test", **given, local_dir=tmp_path / "all")
        assert (found / "onnx" / "model.onnx").is_file()
        found = modelcache.snapshot("test", **given, ignore_patterns="onnx/", local_dir=tmp_path / "some")
        assert [each.name for each in found.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(server):
    with pytest.raises(PermissionError, match=r"/sys/files cannot be written: .*local_dir= or MODELCACHE_HOME"):
        modelcache.snapshot("x", address=server.address, local_dir="/sys/files")


def test_the_home_folder_may_be_written_as_a_tilde(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = modelcache.snapshot("x", address=server.address, local_dir="~/files", allow_patterns="config.json")
    assert found == tmp_path / "files"
    monkeypatch.setenv("MODELCACHE_HOME", "~/home")
    found = modelcache.snapshot("x", address=server.address, allow_patterns="config.json")
    assert found == tmp_path / "home" / "snapshots" / server.active


def test_without_local_dir_files_go_to_the_cache_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELCACHE_HOME", str(tmp_path / "home"))
    found = modelcache.snapshot("x", allow_patterns=["config.json"], address=server.address)
    assert found == tmp_path / "home" / "snapshots" / server.active


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"auto_map": {"AutoModel": "x.Y"}, "model_type": "homemade"}, "trust_remote_code"),
    ],
)
def test_what_cannot_be_streamed_says_what_works(tmp_path, changes, says):
    import json

    folder = save_bert(tmp_path / "model", BertFiles())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with FaultyServer(folder) as server, pytest.raises(UnsupportedModel, match=says) as caught:
        modelcache.StreamingModel("x", address=server.address)
    assert "snapshot()" in str(caught.value)


def test_an_adapter_says_that_its_files_can_be_had(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with FaultyServer(tmp_path) as server, pytest.raises(UnsupportedModel, match="adapter"):
        modelcache.StreamingModel("x", address=server.address)


def test_a_class_for_another_architecture_is_refused(server):
    with pytest.raises(UnsupportedModel, match="AutoModelForSpeechSeq2Seq"):
        modelcache.StreamingModel("x", "AutoModelForSpeechSeq2Seq", address=server.address)
    with pytest.raises(UnsupportedModel, match="no class 'BertForNothing'"):
        modelcache.StreamingModel("x", "BertForNothing", address=server.address)
    for load in (
        modelcache.StreamingModel,
        lambda name, kind, **where: modelcache.from_pretrained(kind, name, **where),
    ):
        with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM cannot be built from .* a 'bert': .*Auto class"):
            load("x", "LlamaForCausalLM", address=server.address)


@pytest.mark.parametrize("given", [{}, {"name": "AutoModel"}])
@pytest.mark.parametrize("there", ["an address", "no address"])
@pytest.mark.parametrize("name", ["bert-base", "bert", "org/name"])
def test_a_name_where_the_class_belongs_is_said(server, name, there, given):
    where = {"address": server.address} if there == "an address" else {}
    with pytest.raises(UnsupportedModel, match=f"no class '{name}'.*takes it before the model's name"):
        modelcache.from_pretrained(name, **given, **where)


def test_a_masked_language_model_loads_with_its_tied_head(tmp_path):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path)
    whole = BertForMaskedLM.from_pretrained(tmp_path)
    ids = torch.arange(12).view(1, 12)
    with FaultyServer(tmp_path) as server:
        with modelcache.StreamingModel("x", BertForMaskedLM, address=server.address) as model:
            decoder = model.model.cls.predictions.decoder
            assert torch.equal(model(ids).logits, whole(ids).logits)
            assert decoder.weight is model.model.bert.embeddings.word_embeddings.weight
        loaded = modelcache.from_pretrained(BertForMaskedLM, "x", address=server.address)
    assert torch.equal(loaded(ids).logits, whole(ids).logits)
