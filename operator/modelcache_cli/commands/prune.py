"""`modelcache prune`: remove snapshots that nobody needs."""

import argparse
from typing import TYPE_CHECKING

from modelcache_api.quantities import format_bytes
from modelcache_api.reasons import Reason
from modelcache_cli.command import Command
from modelcache_cli.lookup import snapshots_of
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_volume, digest_prefix, volume_root
from modelcache_cli.output import emit, say

if TYPE_CHECKING:
    from modelcache_volume import Volume


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_volume(parser)
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be removed; remove nothing")
    parser.add_argument(
        "--keep",
        type=digest_prefix,
        action="append",
        default=[],
        metavar="DIGEST",
        help="spare this snapshot as well (its digest, or the first 8 or more digits); may be given several times",
    )


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_volume import Volume

    volume = Volume.open(volume_root(arguments))
    keep = {snapshot.digest for prefix in arguments.keep for snapshot in snapshots_of(volume, prefix)}
    if arguments.dry_run:
        digests, size = _unneeded(volume, keep)
    else:
        with volume.lock() as writer:
            pruned = writer.prune(keep=keep)
        digests, size = list(pruned.digests), pruned.bytes
    for digest in digests:
        emit(digest)
    did = "would be removed" if arguments.dry_run else "removed"
    say(f"{len(digests)} snapshots {did}, {format_bytes(size)} freed")
    return 0


def _unneeded(volume: "Volume", keep: set[str]) -> tuple[list[str], int]:
    """Digests that pruning would remove, and the bytes of blobs that no other snapshot of their source shares."""
    from modelcache_volume.prune import protected

    stay = protected(volume.actives(), {*keep, *volume.leased()})
    digests: set[str] = set()
    going: dict[tuple[str, bytes], int] = {}
    staying: set[tuple[str, bytes]] = set()
    for snapshot in volume.snapshots():
        blobs = {(snapshot.folder, file.sha256): file.size for file in snapshot.manifest.files}
        if stay.has(snapshot.folder, snapshot.digest):
            staying |= blobs.keys()
        else:
            digests.add(snapshot.digest)
            going |= blobs
            say(f"{snapshot.digest[:12]} {snapshot.manifest.source.repo_id}")
    return sorted(digests), sum(size for blob, size in going.items() if blob not in staying)


COMMAND = Command(
    name="prune",
    summary="remove snapshots that nobody needs from a volume",
    description=(
        "Removes the snapshots that are neither active, nor among the kept earlier ones of an active name "
        "(spec.revisionHistoryLimit), nor leased by a reader in the last 10 minutes, and what interrupted fetches "
        "left behind more than a week ago. Prints the digests removed, one a line."
    ),
    examples=(
        ("modelcache prune --dry-run", "show what would go"),
        ("modelcache prune --keep 3f2a9c1b", "prune, but spare one snapshot"),
    ),
    add_options=_add_options,
    run=_run,
    reasons=(
        Reason.NOT_A_VOLUME,
        Reason.NEWER_FORMAT,
        Reason.SNAPSHOT_NOT_FOUND,
        Reason.CORRUPT_BLOB,
        Reason.VOLUME_BUSY,
    ),
    environment=VOLUME_ENVIRONMENT,
)
