"""The models that tests make are what their descriptions say, for transformers itself."""

import json
import struct

import pytest
import torch
from transformers import BertModel

from support import models
from support.models import TINY, BertFiles, save_bert


def forward(folder) -> torch.Tensor:
    model = BertModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.arange(8).reshape(1, 8)).last_hidden_state


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> torch.Tensor:
    return forward(save_bert(tmp_path_factory.mktemp("reference"), BertFiles()))


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix": "bert."},
        {"old_names": True},
        {"prefix": "bert.", "old_names": True, "shards": 3},
        {"data_offset": 24},
    ],
    ids=str,
)
def test_every_form_of_one_seed_is_the_same_model(tmp_path, reference, changes):
    assert torch.allclose(forward(save_bert(tmp_path, BertFiles(**changes))), reference, atol=1e-5)


def test_another_seed_is_another_model(tmp_path, reference):
    assert not torch.allclose(forward(save_bert(tmp_path, BertFiles(seed=1))), reference, atol=0.1)


@pytest.mark.parametrize("offset", [0, 8, 16, 24])
def test_tensors_start_where_asked(tmp_path, offset):
    content = (save_bert(tmp_path, BertFiles(data_offset=offset)) / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    starts = {
        (8 + length + tensor["data_offsets"][0]) % 64
        for name, tensor in json.loads(content[8 : 8 + length]).items()
        if name != "__metadata__"
    }
    assert starts == {offset}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_and_loaded_as_such(tmp_path, dtype):
    assert BertModel.from_pretrained(save_bert(tmp_path, BertFiles(dtype=dtype))).dtype == getattr(torch, dtype)


def test_a_left_out_weight_is_missing_and_the_heads_come_with_the_prefix(tmp_path):
    names = models.bert_weights(BertFiles(prefix="bert.", leave_out=("pooler.dense.weight",)))
    assert "bert.pooler.dense.bias" in names
    assert "bert.pooler.dense.weight" not in names
    assert "cls.predictions.bias" in names


def test_a_cached_model_is_made_once_and_again_when_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", tmp_path)
    files = BertFiles(config={**TINY, "num_hidden_layers": 1})
    weights = models.cached_bert(files) / "model.safetensors"
    content, made = weights.read_bytes(), weights.stat().st_mtime_ns
    assert models.cached_bert(files) / "model.safetensors" == weights
    assert weights.stat().st_mtime_ns == made

    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    models.cached_bert(files)
    assert weights.read_bytes() == content


def test_the_real_minilm_is_there():
    config = json.loads((models.minilm() / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert (models.minilm() / "model.safetensors").stat().st_size > 90_000_000
