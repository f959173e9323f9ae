"""The I/O of pruning: reads what a source's folder holds, and removes what `prune.decide` says."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache_volume import disk
from modelcache_volume.errors import CorruptBlob
from modelcache_volume.layout import is_digest
from modelcache_volume.prune import FolderState
from modelcache_volume.records import decode_record
from modelcache_volume.v1 import manifest_pb2

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from modelcache_volume.layout import Layout
    from modelcache_volume.prune import Protected, Removal
    from modelcache_volume.volume import Volume


def read_state(volume: Volume, folder: str, stay: Protected) -> FolderState:
    """Reads what a source's folder holds.

    Raises:
        CorruptBlob: The manifest of a snapshot that must stay is damaged, so that its blobs are not known.
        NewerFormat: A newer program wrote a manifest.
    """
    layout = volume.layout
    manifests, damaged = {}, []
    pruned: dict[str, manifest_pb2.Manifest | None] = {}
    for path in _files(layout.manifests(folder)):
        digest = path.stem
        if is_digest(digest) and path.suffix == ".pruned":
            pruned[digest] = None
            with suppress(CorruptBlob):
                pruned[digest] = decode_record(manifest_pb2.Manifest, path.read_bytes(), str(path))
        elif is_digest(digest) and path.suffix == ".pb":
            try:
                manifests[digest] = volume.snapshot(digest, folder).manifest
            except CorruptBlob:
                if stay.has(folder, digest):
                    raise
                damaged.append(digest)
    refs = layout.refs(folder)
    return FolderState(
        folder=folder,
        manifests=manifests,
        damaged=damaged,
        pruned=pruned,
        blobs=_times(_files(layout.blobs(folder))),
        refs={str(path.relative_to(refs)): path.read_text(errors="replace") for path in _files(refs, "**/*")},
        commits=[path.name for path in layout.snapshots(folder).glob("*")],
        incoming={_key(path): path.lstat().st_mtime for path in _files(layout.incoming(folder))},
    )


def carry_out(layout: Layout, folder: str, removal: Removal) -> int:
    """Removes, in the order that leaves whole snapshots whole wherever it is interrupted; returns the bytes freed."""
    # A manifest is renamed first: nobody sees the snapshot any more, and it still says which blobs are to go.
    for digest in removal.manifests:
        layout.manifest(folder, digest).rename(layout.pruned(folder, digest))
    if removal.manifests:
        disk.fsync_folder(layout.manifests(folder))
    _remove_files(layout.refs(folder) / ref for ref in removal.refs)
    _remove_empty_below(layout.refs(folder))
    for commit in removal.commits:
        disk.remove_tree(layout.snapshots(folder) / commit)
    for commit, paths in removal.links.items():
        _remove_links(layout.commit(folder, commit), paths)
    freed = _remove_files(layout.blobs(folder) / name for name in removal.blobs)
    if removal.pruned:
        disk.fsync_folder(layout.blobs(folder))
        _remove_files(layout.pruned(folder, digest) for digest in removal.pruned)
    return freed + _remove_files(path for path in _files(layout.incoming(folder)) if _key(path) in removal.incoming)


def remove_empty(layout: Layout, folder: str) -> None:
    """Removes what is empty of a source's folder, and the folder with it when nothing is left."""
    for part in (layout.blobs(folder), layout.refs(folder), layout.snapshots(folder), layout.incoming(folder)):
        disk.remove_if_empty(part)
    disk.remove_if_empty(layout.manifests(folder))
    disk.remove_if_empty(layout.source(folder))


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    return [path for path in folder.glob(pattern) if path.is_symlink() or not path.is_dir()]


def _times(files: Iterable[Path]) -> dict[str, float]:
    return {path.name: path.lstat().st_mtime for path in files}


def _key(path: Path) -> str:
    # What a downloader keeps beside KEY.part (KEY.ranges, …) belongs to it.
    return path.name.partition(".")[0]


def _remove_files(paths: Iterable[Path]) -> int:
    return sum(disk.remove_file(path) for path in paths)


def _remove_links(top: Path, keep: Collection[str]) -> None:
    _remove_files(path for path in _files(top, "**/*") if str(path.relative_to(top)) not in keep)
    _remove_empty_below(top)


def _remove_empty_below(top: Path) -> None:
    for parent, _, _ in os.walk(top, topdown=False):
        if Path(parent) != top:
            disk.remove_if_empty(Path(parent))
