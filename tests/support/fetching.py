"""What fetch tests share: tiny weight files, specs, and limits without long waits."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
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


_SURROUNDINGS = ("AWS_", "GOOGLE_", "GCE_", "HTTP", "ALL_PROXY", "NO_PROXY", "SSL_CERT", "REQUESTS_")


def run_program(
    command: str, spec: Mapping[str, Any], *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run modelcache-fetch with no proxy, authority or cloud identity but those that the test's environment names."""
    clean = {key: value for key, value in os.environ.items() if not key.upper().startswith(_SURROUNDINGS)}
    clean |= {"AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none", "MODELCACHE_SPEC": json.dumps(spec)}
    if "AWS_EC2_METADATA_SERVICE_ENDPOINT" not in environment:
        clean["AWS_EC2_METADATA_DISABLED"] = "true"
    return subprocess.run(
        [sys.executable, "-m", "modelcache_fetcher", command, *map(str, arguments)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def contents(root: Path, name: str) -> dict[str, bytes]:
    """The files of what is active under a name, read from the volume's blobs."""
    volume = Volume.open(root)
    active = volume.active(name)
    snapshot = volume.snapshot(active.digest, active.folder)
    return {file.path: snapshot.blob_path(file).read_bytes() for file in snapshot.manifest.files}
