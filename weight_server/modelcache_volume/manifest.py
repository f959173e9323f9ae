"""Putting a manifest together from what a fetch learned. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelcache_volume.layout import FORMAT_VERSION
from modelcache_volume.paths import refuse_clashes, validate_path
from modelcache_volume.records import manifest_digest
from modelcache_volume.v1 import manifest_pb2
from modelcache_volume.weights import IndexedFile, build_weight_sets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence


def build_manifest(
    source: manifest_pb2.Source,
    files: Iterable[manifest_pb2.File],
    *,
    weights: Mapping[str, IndexedFile],
    index_files: Mapping[str, bytes],
    allow_patterns: Sequence[str] = (),
    ignore_patterns: Sequence[str] = (),
    left_out: Collection[str] = (),
) -> manifest_pb2.Manifest:
    """Builds the manifest that `VolumeWriter.publish` takes.

    Args:
        source: Where the bytes came from; `commit` is needed.
        files: One entry per file, in any order, with path, size, sha256 and block checksums.
        weights: Indexed weight files by path.
        index_files: Content of the index files of shards (`is_index_file`) by path.
        allow_patterns: As in the spec, for the record.
        ignore_patterns: As in the spec, for the record.
        left_out: Paths that the source has and that were not selected.

    Returns:
        The manifest with its digest; `revisions` is filled in when it is published.

    Raises:
        InvalidPath: A path cannot be stored, or two clash.
        BadWeights: Index files and shards do not belong together.
    """
    ordered = sorted(files, key=lambda file: validate_path(file.path).encode())
    paths = [file.path for file in ordered]
    refuse_clashes(paths)
    weight_sets, tensors = build_weight_sets(weights, index_files, paths, left_out)
    manifest = manifest_pb2.Manifest(
        format_version=FORMAT_VERSION,
        source=source,
        allow_patterns=allow_patterns,
        ignore_patterns=ignore_patterns,
        files=ordered,
        weight_sets=weight_sets,
        tensors=tensors,
    )
    manifest.digest = manifest_digest(manifest)
    return manifest
