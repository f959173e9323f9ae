"""The records on a volume (manifests and active records): how they are written, read back and checked. Pure.

A record is the protobuf message followed by one field more, a fixed32 of number 2047 that no schema declares: the
CRC-32C of all bytes before it. Any protobuf reader skips it; this package refuses a record without it, because the
digest covers only the files' names and contents: a flipped bit in a tensor's shape would otherwise go unnoticed.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

import crc32c
from google.protobuf.message import DecodeError, Message

from modelcache_volume.digest import BLOCK_BYTES, snapshot_digest
from modelcache_volume.errors import CorruptBlob, InvalidPath, NewerFormat
from modelcache_volume.layout import FORMAT_VERSION
from modelcache_volume.paths import refuse_clashes, validate_path

if TYPE_CHECKING:
    from modelcache_volume.v1 import manifest_pb2

_SEAL_TAG = b"\xfd\x7f"  # varint of 2047 << 3 | 5: field 2047, fixed32
_SEAL_BYTES = len(_SEAL_TAG) + 4

_MessageT = TypeVar("_MessageT", bound=Message)


def encode_record(message: Message) -> bytes:
    """A record's bytes on disk; the same for equal messages."""
    body = message.SerializeToString(deterministic=True)
    return body + _SEAL_TAG + crc32c.crc32c(body).to_bytes(4, "little")


def decode_record(kind: type[_MessageT], data: bytes, where: str) -> _MessageT:
    """Reads a record.

    Args:
        kind: The message's type.
        data: The file's bytes.
        where: The file's path, for messages.

    Raises:
        CorruptBlob: The bytes are not what was written.
    """
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if len(seal) < _SEAL_BYTES or seal != _SEAL_TAG + crc32c.crc32c(body).to_bytes(4, "little"):
        raise CorruptBlob(
            f"{where} is damaged: its checksum does not match. Fetch the model again; blobs that are whole are kept.",
            path=where,
        )
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise CorruptBlob(f"{where} is damaged: it is not a {kind.DESCRIPTOR.name}.", path=where) from error


def check_format_version(version: int, what: str) -> None:
    """Raises NewerFormat when a record or layout of that version needs a newer program than this one."""
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{what} has format {version}, but this program reads formats up to {FORMAT_VERSION}: "
            "use a newer release of ModelCache, or another volume."
        )


def manifest_digest(manifest: manifest_pb2.Manifest) -> str:
    """The digest that the manifest's files have, whatever its `digest` says."""
    return snapshot_digest((file.sha256.hex(), file.size, file.path) for file in manifest.files)


def manifest_problem(manifest: manifest_pb2.Manifest) -> str:
    """What contradicts itself in a manifest, or "" when it is sound."""
    return _files_problem(manifest) or _weights_problem(manifest)


def _files_problem(manifest: manifest_pb2.Manifest) -> str:
    paths = [file.path for file in manifest.files]
    if any(first.encode() >= second.encode() for first, second in itertools.pairwise(paths)):
        return "its files are not sorted by path, or a path occurs twice"
    try:
        for path in paths:
            validate_path(path)
        refuse_clashes(paths)
    except InvalidPath as error:
        return str(error)
    for file in manifest.files:
        if len(file.sha256) != 32:
            return f"{file.path} has no sha256 of 32 bytes"
        if file.size < 0 or len(file.block_crc32c) != -(-file.size // BLOCK_BYTES):
            return f"{file.path} has {len(file.block_crc32c)} block checksums, which does not fit {file.size} bytes"
    if manifest_digest(manifest) != manifest.digest:
        return f"its digest {manifest.digest[:64]!r} is not that of its files"
    return ""


def _weights_problem(manifest: manifest_pb2.Manifest) -> str:
    files, sets = len(manifest.files), len(manifest.weight_sets)
    for weight_set in manifest.weight_sets:
        if any(number >= files for number in weight_set.files):
            return f"the weight set {weight_set.path} names a file that is not there"
    for tensor in manifest.tensors:
        if tensor.weight_set >= sets or tensor.file >= files:
            return f"the tensor {tensor.name} names a file or weight set that is not there"
        if tensor.offset < 0 or tensor.length < 0 or tensor.offset + tensor.length > manifest.files[tensor.file].size:
            return f"the tensor {tensor.name} lies outside its file"
        if len(tensor.running_crc32c) != -(-tensor.length // BLOCK_BYTES):
            return f"the tensor {tensor.name} has the wrong number of checksums"
    return ""
