"""Weight files and the sets they form: which tensors a model has, and where their bytes lie. Pure.

A reader of a file format (safetensors, torch's checkpoints) gives an `IndexedFile`; `build_weight_sets` joins shards by
their index files. Both know nothing of each other's format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import crc32c

from modelcache_volume.digest import BLOCK_BYTES
from modelcache_volume.errors import BadWeights, InvalidPath
from modelcache_volume.paths import validate_path
from modelcache_volume.v1 import manifest_pb2
from modelcache_volume.weight_names import WeightName, parse_index_name, parse_weight_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


@dataclass(frozen=True)
class IndexedTensor:
    """One tensor of a weight file.

    Attributes:
        name: As the file spells it.
        dtype: As safetensors spells it ("F32", "BF16", …).
        shape: Elements along each dimension.
        strides: In elements; empty: contiguous, row-major.
        offset: The first byte in the file that covers the tensor's elements.
        length: Bytes from there that cover all of them; tied tensors name the same range.
        running_crc32c: CRC-32C from the tensor's first byte up to each 4 MiB, and up to its end (see manifest.proto).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    running_crc32c: tuple[int, ...]
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class IndexedFile:
    """What one weight file holds.

    Attributes:
        format: How the file is built.
        tensors: In any order; names are unique.
        metadata: `__metadata__` of a safetensors file.
    """

    format: manifest_pb2.WeightFormat.ValueType
    tensors: Sequence[IndexedTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


class RunningCrc:
    """Running CRC-32C of one tensor: its state is kept at every 4 MiB from the tensor's first byte, and at its end."""

    def __init__(self) -> None:
        self._crc = 0
        self._seen = 0
        self._marks: list[int] = []

    def update(self, data: memoryview) -> None:
        """Takes the tensor's next bytes."""
        while len(data):
            part = data[: BLOCK_BYTES - self._seen % BLOCK_BYTES]
            self._crc = crc32c.crc32c(part, self._crc)
            self._seen += len(part)
            if self._seen % BLOCK_BYTES == 0:
                self._marks.append(self._crc)
            data = data[len(part) :]

    def result(self) -> tuple[int, ...]:
        """The values so far; element i covers the first min((i + 1) * 4 MiB, length) bytes."""
        return (*self._marks, self._crc) if self._seen % BLOCK_BYTES else tuple(self._marks)


def build_weight_sets(
    files: Mapping[str, IndexedFile],
    index_files: Mapping[str, bytes],
    paths: Sequence[str],
    left_out: Collection[str] = (),
) -> tuple[list[manifest_pb2.WeightSet], list[manifest_pb2.Tensor]]:
    """Groups weight files into the sets that a model is loaded from.

    An index file (`*.safetensors.index.json`, `*.bin.index.json`) and its shards are one set; every other weight file
    is a set of its own. An index none of whose shards was selected makes no set; one whose shards the source does not
    have either is refused when there are no other weights.

    Args:
        files: Indexed weight files by path.
        index_files: Content of the index files by path; `is_index_file` tells which they are.
        paths: All paths of the manifest, in its order; files are named by their place in it.
        left_out: Paths that the source has and that were not selected.

    Returns:
        The sets, sorted by path, and their tensors, sorted by set, file and offset.

    Raises:
        BadWeights: An index is malformed, names a missing shard or a tensor that its shard lacks, or leaves unclear
            which shard a tensor is read from.
    """
    place = {path: number for number, path in enumerate(paths)}
    groups: dict[str, tuple[WeightName, list[str], dict[str, str]]] = {}
    nowhere: list[tuple[str, str]] = []
    for path, content in index_files.items():
        weight_map = _parse_index(path, content)
        shards = list(dict.fromkeys(weight_map.values()))
        missing = [shard for shard in shards if shard not in files]
        if len(missing) == len(shards):
            nowhere += [(path, shard) for shard in shards if shard not in left_out][:1]
            continue
        if missing:
            raise BadWeights(
                f"{path} names {len(missing)} shards that are not there ({missing[0]}, …): "
                "widen allowPatterns so that all are fetched, or leave the index and its shards out."
            )
        groups[path] = (parse_index_name(path), sorted(shards, key=place.__getitem__), weight_map)
    sharded = {shard for _, shards, _ in groups.values() for shard in shards}
    for path in files:
        if path not in sharded:
            groups[path] = (parse_weight_name(path), [path], {})
    if nowhere and not groups:
        path, shard = nowhere[0]
        raise BadWeights(
            f"{path} names {shard}, which the source does not have, and there are no other weights: "
            "upload the shards, or leave the index out with ignorePatterns."
        )

    sets: list[manifest_pb2.WeightSet] = []
    tensors: list[manifest_pb2.Tensor] = []
    for path in sorted(groups, key=str.encode):
        name, members, weight_map = groups[path]
        sets.append(
            manifest_pb2.WeightSet(
                path=path,
                format=files[members[0]].format,
                subfolder=name.subfolder,
                variant=name.variant,
                files=[place[member] for member in members],
                metadata=files[members[0]].metadata,
            )
        )
        tensors += _set_tensors(path, members, weight_map, files, place, len(sets) - 1)
    return sets, tensors


def _set_tensors(
    path: str,
    members: Sequence[str],
    weight_map: Mapping[str, str],
    files: Mapping[str, IndexedFile],
    place: Mapping[str, int],
    weight_set: int,
) -> list[manifest_pb2.Tensor]:
    found: dict[str, str] = {}
    chosen: list[tuple[int, IndexedTensor]] = []
    for member in members:
        for tensor in files[member].tensors:
            # Loaders read whole shards, so tensors that the index forgets count as well.
            if weight_map.get(tensor.name, member) != member:
                continue
            if tensor.name in found:
                raise BadWeights(
                    f"{path}: the tensor {tensor.name!r} is both in {found[tensor.name]} and in {member}, "
                    "and the index does not say which one counts."
                )
            found[tensor.name] = member
            chosen.append((place[member], tensor))
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise BadWeights(
            f"{path} says that {weight_map[absent[0]]} holds the tensor {absent[0]!r}, but it does not "
            f"({len(absent)} tensors are missing in all): the index and the shards do not belong together."
        )
    chosen.sort(key=lambda entry: (entry[0], entry[1].offset, entry[1].length, entry[1].name))
    return [
        manifest_pb2.Tensor(
            name=tensor.name,
            weight_set=weight_set,
            dtype=tensor.dtype,
            shape=tensor.shape,
            strides=tensor.strides,
            file=number,
            offset=tensor.offset,
            length=tensor.length,
            running_crc32c=tensor.running_crc32c,
        )
        for number, tensor in chosen
    ]


def _parse_index(path: str, content: bytes) -> dict[str, str]:
    """Reads an index file's weight_map (tensor name to shard), with the shards' paths from the repo's root."""
    try:
        document = json.loads(content, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path} is not valid JSON ({error}): fetch it again or mend it at the source.") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadWeights(f"{path} has no weight_map: it cannot say which shard holds which tensor.")
    folder = path.rpartition("/")[0]
    result = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise BadWeights(f"{path}: the shard of {name!r} is not a file name.")
        try:
            result[name] = validate_path(f"{folder}/{shard}" if folder else shard)
        except InvalidPath as error:
            raise BadWeights(f"{path} points to a shard outside its folder: {error}") from error
    return result


def _unique(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadWeights(f"{path} has the same key twice in one JSON object.")
    return result
