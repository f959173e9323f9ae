"""A ModelCache volume: its layout, its records, the index of its weights, and how all of it is written and removed.

Readers need `Volume` and `Snapshot`; the one writer at a time gets a `VolumeWriter` from `Volume.lock`.
docs/concepts/volume.md describes what lies where.
"""

from modelcache_volume.digest import ALGORITHMS, BLOCK_BYTES, ContentDigests, ContentHasher, snapshot_digest
from modelcache_volume.disk import space_errors
from modelcache_volume.errors import (
    BadManifest,
    BadWeights,
    ChecksumMismatch,
    CorruptBlob,
    FileNotInSnapshot,
    InvalidPath,
    NewerFormat,
    NoActiveRevision,
    NoSpace,
    NotAVolume,
    SnapshotNotFound,
    VolumeBusy,
    VolumeError,
)
from modelcache_volume.layout import FORMAT_VERSION, LEASE_SECONDS, source_folder
from modelcache_volume.manifest import build_manifest
from modelcache_volume.paths import refuse_clashes, validate_path
from modelcache_volume.safetensors_index import DTYPE_BITS, SafetensorsIndexer
from modelcache_volume.torch_index import index_torch_checkpoint
from modelcache_volume.volume import Problem, Snapshot, Volume
from modelcache_volume.weight_names import is_index_file, is_torch_checkpoint
from modelcache_volume.weights import IndexedFile, IndexedTensor, build_weight_sets
from modelcache_volume.writer import Pruned, VolumeWriter

__all__ = [
    "ALGORITHMS",
    "BLOCK_BYTES",
    "DTYPE_BITS",
    "FORMAT_VERSION",
    "LEASE_SECONDS",
    "BadManifest",
    "BadWeights",
    "ChecksumMismatch",
    "ContentDigests",
    "ContentHasher",
    "CorruptBlob",
    "FileNotInSnapshot",
    "IndexedFile",
    "IndexedTensor",
    "InvalidPath",
    "NewerFormat",
    "NoActiveRevision",
    "NoSpace",
    "NotAVolume",
    "Problem",
    "Pruned",
    "SafetensorsIndexer",
    "Snapshot",
    "SnapshotNotFound",
    "Volume",
    "VolumeBusy",
    "VolumeError",
    "VolumeWriter",
    "build_manifest",
    "build_weight_sets",
    "index_torch_checkpoint",
    "is_index_file",
    "is_torch_checkpoint",
    "refuse_clashes",
    "snapshot_digest",
    "source_folder",
    "space_errors",
    "validate_path",
]
