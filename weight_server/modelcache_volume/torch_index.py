"""Index of a checkpoint that torch.save wrote, without torch and without running anything of it.

Both formats: the zip container of torch 1.6 and later, and the row of pickles before it
(https://github.com/pytorch/pytorch/blob/main/torch/serialization.py).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelcache_volume.digest import BLOCK_BYTES
from modelcache_volume.errors import BadWeights
from modelcache_volume.safetensors_index import DTYPE_BITS
from modelcache_volume.torch_pickle import MAX_PICKLE_BYTES, RefusedPickleError, Storage, TensorView, read_pickle
from modelcache_volume.torch_zip import RefusedZipError, read_zip_directory
from modelcache_volume.v1 import manifest_pb2
from modelcache_volume.weights import IndexedFile, IndexedTensor, RunningCrc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# The pickles of a file before torch 1.6 stand at its start, and nothing says how long they are.
_LEGACY_PICKLES_BYTES = MAX_PICKLE_BYTES
# Views may share bytes, each of which is read once per distinct range: bounds what a hostile file makes us read.
_MAX_REREADS = 8
# An expanded tensor has more elements than are stored; small buffers are saved so (position ids), weights never.
_MAX_EXPANDED = 2**20

_DTYPES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}


class _RefusedError(Exception):
    """Why the checkpoint is refused."""


@dataclass(frozen=True)
class _Run:
    """Bytes of a storage in the file."""

    offset: int
    length: int


def index_torch_checkpoint(path: str, descriptor: int) -> IndexedFile:
    """Reads which tensors a checkpoint holds and where their bytes are, and computes their running CRC-32C.

    Taken are the tensors of the state dict: the dict that was saved, or, when that has none itself, the only dict in it
    that has. Tied tensors name the same bytes; tensors that are not contiguous have strides.

    Args:
        path: The file's path in its repo, for messages.
        descriptor: The file, open for reading; its position does not matter.

    Raises:
        BadWeights: It is cut off or malformed, holds something else than a state dict, or its pickle asks for anything
            that a state dict does not need (the message names it).
    """
    file = _File(descriptor)
    try:
        if file.read(0, min(4, file.size)) == b"PK\3\4":
            form = manifest_pb2.WEIGHT_FORMAT_TORCH_ZIP
            value, runs = _read_zip(file)
        else:
            form = manifest_pb2.WEIGHT_FORMAT_TORCH_LEGACY
            value, runs = _read_legacy(file)
        tensors = [_locate(name, view, runs) for name, view in _state_dict(value).items()]
        return IndexedFile(form, _with_checksums(file, tensors))
    except (_RefusedError, RefusedPickleError, RefusedZipError) as error:
        raise BadWeights(
            f"{path[:200]} is not a PyTorch checkpoint that can be served: {error}. Use the repo's safetensors file "
            "if it has one, leave this file out by pattern, or save its state_dict again."
        ) from error


class _File:
    """Exact reads, behind which the page cache is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset) if 0 <= offset <= offset + length <= self.size else b""
        if len(data) != length:
            raise _RefusedError("it is cut off")
        return data

    def checksum(self, offset: int, length: int, buffer: memoryview) -> tuple[int, ...]:
        crc = RunningCrc()
        end = offset + length
        while offset < end:
            count = os.preadv(self._descriptor, [buffer[: end - offset]], offset)
            if not count:
                raise _RefusedError("it became shorter while it was read")
            crc.update(buffer[:count])
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            offset += count
        return crc.result()


def _read_zip(file: _File) -> tuple[Any, dict[str, _Run]]:
    entries = read_zip_directory(file.read, file.size)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _RefusedError("it is a zip file without one data.pkl, which torch.save did not write")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order and (order.size > 10 or file.read(order.offset, order.size) != b"little"):
        raise _RefusedError("its numbers are big-endian")
    entry = entries[pickles[0]]
    if entry.size > MAX_PICKLE_BYTES:
        raise _RefusedError(f"its pickle has {entry.size} bytes, more than any state dict needs")
    value = read_pickle(file.read(entry.offset, entry.size)).value
    prefix = f"{folder}data/"
    runs = {
        name.removeprefix(prefix): _Run(entry.offset, entry.size)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    return value, runs


def _read_legacy(file: _File) -> tuple[Any, dict[str, _Run]]:
    data = file.read(0, min(file.size, _LEGACY_PICKLES_BYTES))
    if not data.startswith(b"\x80"):
        raise _RefusedError("it is neither a zip file nor a pickle")
    magic = read_pickle(data)
    if magic.value != _LEGACY_MAGIC:
        raise _RefusedError("it is a pickle, but none that torch.save wrote")
    protocol = read_pickle(data, magic.end)
    system = read_pickle(data, protocol.end)
    if protocol.value != _LEGACY_PROTOCOL or _property(system.value, "little_endian") is not True:
        raise _RefusedError("it has an unknown version, or big-endian numbers")
    saved = read_pickle(data, system.end)
    keys = read_pickle(data, saved.end)
    order = keys.value if isinstance(keys.value, list) else []
    if not all(isinstance(key, str) for key in order) or sorted(order) != sorted(saved.storages):
        raise _RefusedError("its list of storages is not that of its tensors")
    return saved.value, _legacy_runs(file, keys.end, [saved.storages[key] for key in order])


def _property(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _legacy_runs(file: _File, position: int, storages: Iterable[Storage]) -> dict[str, _Run]:
    """Where each storage lies: an int64 with its number of elements, then these, one storage after the other."""
    runs = {}
    for storage in storages:
        count = int.from_bytes(file.read(position, 8), "little", signed=True)
        if count != storage.count:
            raise _RefusedError("a storage has another length than its tensors say")
        runs[storage.key] = _Run(position + 8, count * _item_bytes(storage.kind))
        position += 8 + runs[storage.key].length
        if position > file.size:
            raise _RefusedError("it is cut off")
    if position != file.size:
        raise _RefusedError(f"{file.size - position} bytes follow its last storage")
    return runs


def _state_dict(value: Any) -> dict[str, TensorView]:
    if type(value) is not dict:
        raise _RefusedError(f"it holds a {type(value).__name__}, not a state dict")
    tensors = _tensors(value)
    nested = [found for inner in value.values() if type(inner) is dict and (found := _tensors(inner))]
    if not tensors and len(nested) == 1:
        return nested[0]
    if nested:
        raise _RefusedError("it holds several dicts of tensors, and nothing says which one is the state dict")
    if value and not tensors:
        raise _RefusedError("it holds no tensors that a model could load")
    return tensors


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, TensorView]:
    found = {name: value for name, value in mapping.items() if isinstance(value, TensorView)}
    for name in found:
        if not isinstance(name, str) or not name.isprintable():
            raise _RefusedError("a tensor's name is not plain text")
    return found


def _item_bytes(kind: str) -> int:
    return DTYPE_BITS[_DTYPES[kind]] // 8


def _locate(name: str, view: TensorView, runs: Mapping[str, _Run]) -> IndexedTensor:
    dtype = _DTYPES[view.dtype or view.storage.kind]
    item = DTYPE_BITS[dtype] // 8
    run = runs.get(view.storage.key)
    if run is None:
        raise _RefusedError(f"the bytes of the tensor {name[:200]!r} are missing")
    stored = view.storage.count * _item_bytes(view.storage.kind)
    elements = math.prod(view.shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    extent = extent if elements else 0
    if stored > run.length or (view.offset + extent) * item > stored:
        raise _RefusedError(f"the tensor {name[:200]!r} lies outside its storage")
    if elements > max(extent, _MAX_EXPANDED):
        raise _RefusedError(f"the tensor {name[:200]!r} has {elements} elements, of which only {extent} are stored")
    return IndexedTensor(
        name=name,
        dtype=dtype,
        shape=view.shape,
        offset=run.offset + view.offset * item,
        length=extent * item,
        running_crc32c=(),
        strides=() if _is_contiguous(view) else view.strides,
    )


def _is_contiguous(view: TensorView) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _with_checksums(file: _File, tensors: Iterable[IndexedTensor]) -> list[IndexedTensor]:
    tensors = list(tensors)
    ranges = sorted({(tensor.offset, tensor.length) for tensor in tensors})
    if sum(length for _, length in ranges) > _MAX_REREADS * file.size:
        raise _RefusedError("its tensors are views of each other, many times over")
    buffer = memoryview(bytearray(BLOCK_BYTES))
    checksums = {(offset, length): file.checksum(offset, length, buffer) for offset, length in ranges}
    return [
        IndexedTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            offset=tensor.offset,
            length=tensor.length,
            running_crc32c=checksums[tensor.offset, tensor.length],
            strides=tensor.strides,
        )
        for tensor in tensors
    ]
