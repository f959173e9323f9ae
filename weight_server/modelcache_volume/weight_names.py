"""What names of weight files say, as transformers and diffusers spell them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SUFFIXES = ("safetensors", "bin")
# The stems that transformers, diffusers and peft write; what stands between one of them and the suffix is the variant.
_STEMS = frozenset({"model", "pytorch_model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights"})
# Of these, the ones that are PyTorch checkpoints when they end in .bin; training_args.bin and others are not weights.
_TORCH_STEMS = _STEMS - {"model"}
_VARIANT = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")


@dataclass(frozen=True)
class WeightName:
    """What a weight file's path says.

    Attributes:
        subfolder: Folder inside the repo; "" for its root.
        variant: "fp16" of model.fp16.safetensors; "" without one.
    """

    subfolder: str
    variant: str


def is_torch_checkpoint(path: str) -> bool:
    """Whether the path is one of PyTorch weights (pytorch_model.bin, a shard or a variant of it, …)."""
    name = path.rpartition("/")[2]
    return name.endswith(".bin") and _SHARD.sub("", name.removesuffix(".bin")).split(".")[0] in _TORCH_STEMS


def is_index_file(path: str) -> bool:
    """Whether the path is one of an index of shards (model.safetensors.index.json, also with a variant in it)."""
    parts = path.rpartition("/")[2].split(".")
    return len(parts) >= 4 and parts[-1] == "json" and "index" in parts[1:] and any(s in parts[1:] for s in _SUFFIXES)


def parse_index_name(path: str) -> WeightName:
    """Reads the subfolder and variant of an index file.

    Transformers writes model.safetensors.index.fp16.json, older diffusers model.fp16.safetensors.index.json.
    """
    folder, _, name = path.rpartition("/")
    rest = [part for part in name.split(".")[1:-1] if part not in {"index", *_SUFFIXES}]
    return WeightName(folder, ".".join(rest))


def parse_weight_name(path: str) -> WeightName:
    """Reads the subfolder and variant of a weight file: unet/model.fp16.safetensors gives ("unet", "fp16")."""
    folder, _, name = path.rpartition("/")
    stem, *rest = _SHARD.sub("", name.rpartition(".")[0]).split(".")
    if stem in _STEMS or (len(rest) == 1 and _VARIANT.fullmatch(rest[0])):
        return WeightName(folder, ".".join(rest))
    return WeightName(folder, "")
