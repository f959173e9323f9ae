"""What fetch tests share: tiny weight files, specs, and limits without long waits."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelcache_api.resource import ModelCacheSpec
from modelcache_fetcher import FetchOptions
from modelcache_fetcher.retry import Limits
from modelcache_volume import Volume

IMPATIENT = Limits(
    attempts=4,
    backoff=0.01,
    backoff_cap=0.05,
    connect_timeout=5.0,
    read_timeout=5.0,
    stall_timeout=30.0,
    rate_limit_wait=5.0,
)
"""Limits with which a failing test ends within seconds."""


def safetensors_bytes(tensors: Mapping[str, int], *, fill: bytes = b"\x01\x02\x03\x04\x05\x06\x07") -> bytes:
    """A safetensors file with one U8 tensor of each given length in bytes, its content repeating ``fill``."""
    header: dict[str, Any] = {}
    position = 0
    for name, length in tensors.items():
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": [position, position + length]}
        position += length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    body = (fill * (position // len(fill) + 1))[:position]
    return struct.pack("<Q", len(encoded)) + encoded + body


def spec(repo_id: str, **fields: Any) -> ModelCacheSpec:
    """A spec with the given fields, in Python's spelling."""
    return ModelCacheSpec.model_validate({"repo_id": repo_id, **fields})


def options(**fields: Any) -> FetchOptions:
    """Options with impatient limits."""
    return FetchOptions(**{"limits": IMPATIENT, **fields})


def contents(root: Path, name: str) -> dict[str, bytes]:
    """The files of what is active under a name, read from the volume's blobs."""
    volume = Volume.open(root)
    active = volume.active(name)
    snapshot = volume.snapshot(active.digest, active.folder)
    return {file.path: snapshot.blob_path(file).read_bytes() for file in snapshot.manifest.files}
