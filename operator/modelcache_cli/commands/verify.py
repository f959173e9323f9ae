"""`modelcache verify`: read every byte again."""

import argparse
from typing import TYPE_CHECKING

from modelcache_api.quantities import format_bytes
from modelcache_api.reasons import REASONS, Reason
from modelcache_cli.command import Command
from modelcache_cli.lookup import snapshots_of
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_volume, digest_prefix, volume_root
from modelcache_cli.output import ByteCounter, ProgressDisplay, say

if TYPE_CHECKING:
    from modelcache_volume import Problem, Snapshot


def verify_snapshot(snapshot: "Snapshot") -> "list[Problem]":
    """Re-hash one snapshot with a progress display; what is wrong with it."""
    total = sum({file.sha256: file.size for file in snapshot.manifest.files}.values())
    counter = ByteCounter("verifying", total)
    with ProgressDisplay(counter.counters, f"verify {snapshot.digest[:12]}"):
        return snapshot.verify(counter.add)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_volume(parser)
    parser.add_argument(
        "--digest",
        type=digest_prefix,
        metavar="DIGEST",
        help="only the snapshot with this digest, or its first 8 or more digits (default: all)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_volume import Volume

    volume = Volume.open(volume_root(arguments))
    damaged = []
    if arguments.digest:
        snapshots = snapshots_of(volume, arguments.digest)
    else:
        snapshots = volume.snapshots()
        damaged += volume.damaged()
    for snapshot in snapshots:
        problems = verify_snapshot(snapshot)
        damaged += problems
        size = format_bytes(sum(file.size for file in snapshot.manifest.files))
        what = f"{len(problems)} damaged" if problems else "whole"
        source = snapshot.manifest.source.repo_id
        say(f"{snapshot.digest[:12]} {source}: {len(snapshot.manifest.files)} files, {size}: {what}")
    for problem in damaged:
        say(f"modelcache: {problem.what}")
    return REASONS[Reason.CORRUPT_BLOB].exit_code if damaged else 0


COMMAND = Command(
    name="verify",
    summary="read every byte of a volume again and compare it with what was published",
    description=(
        "Reads every file of every snapshot again and compares its SHA-256 and the CRC-32C of each 4 MiB block with "
        "what was published. Writes nothing, and drops what it read from the page cache. Damage is told file by "
        "file."
    ),
    examples=(
        ("modelcache verify", "check all of the default volume"),
        ("modelcache verify --volume /mnt/models --digest 3f2a9c1b", "check one snapshot"),
    ),
    add_options=_add_options,
    run=_run,
    reasons=(Reason.NOT_A_VOLUME, Reason.NEWER_FORMAT, Reason.SNAPSHOT_NOT_FOUND, Reason.CORRUPT_BLOB),
    environment=VOLUME_ENVIRONMENT,
)
