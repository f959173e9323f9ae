"""Cuts a manifest into messages of bounded size, and puts it together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from modelcache_volume.v1 import manifest_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.message import Message

# Metadata after the last part: CRC-32C (8 hex digits) of all responses' bytes, one after another.
CHECKSUM_KEY = "modelcache-crc32c"
_REPEATED: tuple[Literal["files", "weight_sets", "tensors"], ...] = ("files", "weight_sets", "tensors")


def split_manifest(manifest: manifest_pb2.Manifest, part_bytes: int) -> Iterator[manifest_pb2.Manifest]:
    """Parts of a manifest, in order.

    Args:
        manifest: what to cut; not changed.
        part_bytes: about how large a part may be; one of more holds a single element, which is not cut.
    """
    part = manifest_pb2.Manifest()
    part.CopyFrom(manifest)
    for name in _REPEATED:
        part.ClearField(name)
    size = part.ByteSize()
    for name in _REPEATED:
        elements: Iterable[Message] = getattr(manifest, name)
        for element in elements:
            length = element.ByteSize() + 8
            if size and size + length > part_bytes:
                yield part
                part, size = manifest_pb2.Manifest(), 0
            getattr(part, name).append(element)
            size += length
    yield part


def join_manifest(parts: Iterable[manifest_pb2.Manifest]) -> manifest_pb2.Manifest:
    """The manifest that `split_manifest` cut."""
    whole = manifest_pb2.Manifest()
    for part in parts:
        whole.MergeFrom(part)
    return whole
