"""One set of weights out of many: what is left out of a repo when no allowPatterns are given. Pure.

Repos carry the same weights in many forms: safetensors and PyTorch files, half-precision variants, other frameworks'
formats, original checkpoints, a dozen GGUF quantisations. A model needs one. Chosen is, folder by folder: safetensors
if complete, else PyTorch's; without a variant if there is one. An adapter or another model beside it stays, as do files
that are no weights.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})$")
_OTHER_FORMATS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".ckpt", ".nemo", ".pdparams")
_OTHER_FORMAT_FOLDERS = (".mlpackage/", "openvino/")
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states)[^/]*\.(bin|pt|pth|pkl)$")
_OPENVINO = re.compile(r"(^|/)openvino_[^/]*\.(bin|xml)$")
_CHECKPOINT_FOLDER = re.compile(r"(^|/)checkpoint-\d+/")
_ORIGINAL = re.compile(r"(^|/)(original/|consolidated\.)")
_QUANTISATIONS = ("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q4_0", "Q5_K_S", "Q6_K", "Q8_0", "F16", "BF16")
"""Of several GGUF files, the first of these is taken; llama.cpp's own default is the first."""


@dataclass(frozen=True, slots=True)
class _WeightSet:
    """Files that belong together: one, or all shards.

    Attributes:
        folder: Inside the repo, with a slash at its end; "" for the root.
        stem: "model" of model.fp16-00001-of-00002.safetensors.
        variant: "fp16" of it.
        suffix: ".safetensors", ".bin" or ".gguf".
        paths: Its files, without an index file.
        shards: How many there are to be; 1 for a single file.
    """

    folder: str
    stem: str
    variant: str
    suffix: str
    shards: int
    paths: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """No shard is missing."""
        return len(self.paths) == self.shards

    @property
    def model(self) -> str:
        """What the weights are of, in whatever format: "model" also of pytorch_model.bin."""
        return self.stem.removeprefix("pytorch_")


def left_out(paths: Iterable[str]) -> dict[str, str]:
    """Which files a model does not need, each with the reason.

    Args:
        paths: All candidates.

    Returns:
        The reason by path; what is not in it is to be fetched. Empty if there are no weights in a known format.
    """
    every = sorted(paths)
    out: dict[str, str] = {}
    for path in every:
        if reason := _never_needed(path):
            out[path] = reason
    sets = _weight_sets([path for path in every if path not in out])
    tensors = [each for each in sets if each.suffix in {".safetensors", ".bin"}]
    if not tensors:
        return {**out, **_one_quantisation(sets)} if sets else {}
    single_files = "model_index.json" in every and any(each.folder for each in tensors)
    by_folder: defaultdict[str, list[_WeightSet]] = defaultdict(list)
    for each in tensors:
        if single_files and not each.folder:
            _leave_out(each, every, "the folders named by model_index.json hold the same weights", out)
        else:
            by_folder[each.folder].append(each)
    for folder_sets in by_folder.values():
        _one_per_folder(folder_sets, every, out)
    for each in sets:
        if each.suffix == ".gguf":
            _leave_out(each, every, "the repo has the weights unquantised", out)
    return out


def _never_needed(path: str) -> str:
    """Why a file is not needed beside safetensors or PyTorch weights; "" if it may be."""
    if _TRAINING.search(path):
        return "state of a training run"
    if _CHECKPOINT_FOLDER.search(path):
        return "intermediate checkpoint of a training run"
    if path.endswith(_OTHER_FORMATS) or _OPENVINO.search(path) or any(part in path for part in _OTHER_FORMAT_FOLDERS):
        return "weights of another framework"
    if _ORIGINAL.search(path):
        return "original form of the same weights"
    if path.endswith((".pt", ".pth")):
        return "another PyTorch file beside the weights"
    return ""


def _weight_sets(paths: list[str]) -> list[_WeightSet]:
    groups: defaultdict[tuple[str, str, str, str, int], list[str]] = defaultdict(list)
    for path in paths:
        folder, slash, name = path.rpartition("/")
        base, dot, suffix = name.rpartition(".")
        if f".{suffix}" not in {".safetensors", ".bin", ".gguf"} or not dot:
            continue
        shard = _SHARD.fullmatch(base)
        stem, variant = (shard[1] if shard else base), ""
        if suffix != "gguf":
            stem, _, variant = stem.partition(".")
        # Transformers 4 wrote model-00001-of-00002.fp16.safetensors.
        if not shard and (odd := _SHARD.fullmatch(stem)):
            shard, stem = odd, odd[1]
        groups[folder + slash, stem, variant, f".{suffix}", int(shard[3]) if shard else 1].append(path)
    return [_WeightSet(*key, tuple(members)) for key, members in groups.items()]


def _one_per_folder(sets: list[_WeightSet], every: list[str], out: dict[str, str]) -> None:
    """Of each model one set: complete, without a variant, safetensors, in one file, in this order of importance."""
    for model in dict.fromkeys(each.model for each in sets):
        alike = [each for each in sets if each.model == model]
        best = min(alike, key=_rank)
        for each in alike:
            if each is best:
                continue
            if each.complete < best.complete:
                reason = f"incomplete, unlike {best.paths[0]}"
            elif each.variant and each.variant != best.variant:
                reason = f"variant {each.variant!r} of {best.paths[0]}"
            else:
                reason = f"the same weights as {best.paths[0]}"
            _leave_out(each, every, reason, out)


def _rank(weights: _WeightSet) -> tuple[bool, bool, str, bool, int]:
    """Less is better."""
    return (
        not weights.complete,
        bool(weights.variant),
        weights.variant,
        weights.suffix != ".safetensors",
        weights.shards,
    )


def _one_quantisation(sets: list[_WeightSet]) -> dict[str, str]:
    """Of several GGUF models one; a projector (mmproj) beside it stays."""
    out: dict[str, str] = {}
    models = [each for each in sets if each.suffix == ".gguf" and not each.stem.startswith("mmproj")]
    if len(models) < 2:
        return out

    def rank(each: _WeightSet) -> tuple[bool, int, str, str]:
        name = each.stem.upper().replace("-", "_")
        found = [place for place, kind in enumerate(_QUANTISATIONS) if name.endswith(kind)]
        return not each.complete, min(found, default=len(_QUANTISATIONS)), each.folder, each.stem

    best = min(models, key=rank)
    for each in models:
        if each is not best:
            _leave_out(each, [], f"another quantisation than {best.paths[0]}", out)
    return out


def _leave_out(weights: _WeightSet, every: Iterable[str], reason: str, out: dict[str, str]) -> None:
    """Leave a set out, and the index files that belong to it alone."""
    out.update(dict.fromkeys(weights.paths, reason))
    variant = f".{weights.variant}" if weights.variant else ""
    stem, suffix = weights.folder + weights.stem, weights.suffix
    indexes = {f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"}
    out.update(dict.fromkeys(indexes & set(every), reason))
