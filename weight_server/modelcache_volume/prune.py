"""What pruning removes. Pure: decides from what is on the volume; `VolumeWriter.prune` carries it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from modelcache_volume.v1 import manifest_pb2

INCOMING_SECONDS = 7 * 24 * 3600
"""Age in seconds after which what an interrupted fetch left behind is given up."""


@dataclass(frozen=True)
class FolderState:
    """What one source's folder holds.

    Attributes:
        folder: Its name under hub/.
        manifests: Published snapshots by digest.
        damaged: Digests whose manifest cannot be read.
        pruned: Manifests by digest whose removal was begun; None where it cannot be read.
        blobs: Modification time of each blob by name.
        refs: Commit of each ref.
        commits: Names in snapshots/.
        incoming: Modification time of each partial file by key.
    """

    folder: str
    manifests: Mapping[str, manifest_pb2.Manifest]
    damaged: Collection[str] = ()
    pruned: Mapping[str, manifest_pb2.Manifest | None] = field(default_factory=dict)
    blobs: Mapping[str, float] = field(default_factory=dict)
    refs: Mapping[str, str] = field(default_factory=dict)
    commits: Collection[str] = ()
    incoming: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Protected:
    """What must stay.

    Attributes:
        snapshots: (folder, digest) of what is active, or kept as its history.
        commits: (folder, commit) of the same.
        digests: Kept in whatever folder: leased ones, and those the caller names.
    """

    snapshots: frozenset[tuple[str, str]]
    commits: frozenset[tuple[str, str]]
    digests: frozenset[str]

    def has(self, folder: str, digest: str) -> bool:
        """Whether a snapshot must stay."""
        return digest in self.digests or (folder, digest) in self.snapshots


@dataclass(frozen=True)
class Removal:
    """What goes from one source's folder, in the order of the attributes.

    Attributes:
        manifests: Digests.
        refs: Names of refs.
        commits: Names in snapshots/.
        links: Paths to keep by commit; other links of these commits go.
        blobs: Names of blobs.
        pruned: Digests whose removal is then complete.
        incoming: Keys of partial files.
    """

    manifests: tuple[str, ...]
    refs: tuple[str, ...]
    commits: tuple[str, ...]
    links: Mapping[str, frozenset[str]]
    blobs: tuple[str, ...]
    pruned: tuple[str, ...]
    incoming: tuple[str, ...]


def protected(actives: Iterable[manifest_pb2.Active], digests: Collection[str]) -> Protected:
    """Works out what must stay.

    Args:
        actives: All active records of the volume.
        digests: Leased ones, and those the caller names.
    """
    revisions = []
    for active in actives:
        revisions.append((active.folder, active.digest, active.commit))
        revisions += [(old.folder, old.digest, old.commit) for old in active.history[: active.history_limit]]
    return Protected(
        snapshots=frozenset((folder, digest) for folder, digest, _ in revisions),
        commits=frozenset((folder, commit) for folder, _, commit in revisions),
        digests=frozenset(digests),
    )


def decide(
    state: FolderState,
    stay: Protected,
    now: float,
    *,
    in_use: Collection[str] = (),
    keep_incoming: Collection[str] | None = None,
) -> Removal:
    """Decides what goes from one source's folder.

    Blobs of removed snapshots go unless a kept one shares them. Blobs that belong to no snapshot, and partial files,
    are what an interrupted fetch continues from: they go when they are a week old, or when the caller says what is
    still wanted.

    Args:
        state: What the folder holds.
        stay: What must stay.
        now: Seconds since the Unix epoch.
        in_use: Names of blobs that the running fetch relies on.
        keep_incoming: Keys of partial files still wanted, when the caller knows them; None: it does not.
    """
    kept = {digest: manifest for digest, manifest in state.manifests.items() if stay.has(state.folder, digest)}
    removed = {digest: manifest for digest, manifest in state.manifests.items() if digest not in kept}
    kept_blobs = {name for manifest in kept.values() for name in _blobs(manifest)}
    spared = set(in_use) - kept_blobs
    begun = {**state.pruned, **removed}
    garbage = {name for manifest in begun.values() for name in _blobs(manifest)}
    links = _wanted_links(state, kept, stay)

    def given_up(modified: float) -> bool:
        return now - modified > INCOMING_SECONDS

    return Removal(
        manifests=tuple(sorted((*removed, *state.damaged))),
        refs=tuple(sorted(ref for ref, commit in state.refs.items() if commit not in links)),
        commits=tuple(sorted(commit for commit in state.commits if commit not in links)),
        links=links,
        blobs=tuple(
            sorted(
                name
                for name, modified in state.blobs.items()
                if name not in kept_blobs
                and name not in spared
                and (name in garbage or keep_incoming is not None or given_up(modified))
            )
        ),
        # While the running fetch spares one of its blobs, a former manifest stays to say that the blob may go.
        pruned=tuple(
            sorted({d for d, manifest in begun.items() if spared.isdisjoint(_blobs(manifest))} | set(state.damaged))
        ),
        incoming=tuple(
            sorted(
                key
                for key, modified in state.incoming.items()
                if (key not in keep_incoming if keep_incoming is not None else given_up(modified))
            )
        ),
    )


def _blobs(manifest: manifest_pb2.Manifest | None) -> set[str]:
    return {file.sha256.hex() for file in manifest.files} if manifest else set()


def _wanted_links(
    state: FolderState, kept: Mapping[str, manifest_pb2.Manifest], stay: Protected
) -> dict[str, frozenset[str]]:
    """Paths by commit that kept snapshots have: of each its newest revision, and those that something names."""
    named = set(state.refs.values()) | {commit for folder, commit in stay.commits if folder == state.folder}
    links: dict[str, frozenset[str]] = {}
    for manifest in kept.values():
        paths = frozenset(file.path for file in manifest.files)
        seen = {revision.commit for revision in manifest.revisions} & named
        for commit in seen | {manifest.source.commit}:
            links[commit] = links.get(commit, frozenset()) | paths
    return links
