"""`modelcache ls`: what is on a volume."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from modelcache_api.quantities import format_bytes
from modelcache_api.reasons import Reason
from modelcache_cli.command import Command
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_json, add_volume, volume_root
from modelcache_cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from modelcache_volume import Snapshot
    from modelcache_volume.v1 import manifest_pb2


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_volume(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_volume import LEASE_SECONDS, Volume

    volume = Volume.open(volume_root(arguments))
    actives = volume.actives()
    oldest = time.time() - LEASE_SECONDS
    readers: dict[str, list[str]] = {}
    for digest, holder, renewed in volume.leases():
        if renewed > oldest:
            readers.setdefault(digest, []).append(holder)
    rows = [_describe(snapshot, actives, readers) for snapshot in volume.snapshots()]
    rows.sort(key=lambda row: (not row["activeAs"], row["repoId"], -row["publishedAt"]))
    damaged = volume.damaged()
    if arguments.json:
        problems = [{"path": problem.path, "problem": problem.what} for problem in damaged]
        print_json({"volume": str(volume.root), "snapshots": rows, "damaged": problems})
    else:
        _print(rows)
        for problem in damaged:
            say(f"modelcache: {problem.what}")
        if not rows:
            say(f"{volume.root} holds no snapshot yet")
    return 0


def _describe(
    snapshot: "Snapshot", actives: "list[manifest_pb2.Active]", readers: dict[str, list[str]]
) -> dict[str, Any]:
    manifest = snapshot.manifest
    source = manifest.source
    return {
        "digest": snapshot.digest,
        "repoId": source.repo_id,
        "endpoint": source.endpoint,
        "requested": source.requested,
        "commit": source.commit,
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files),
        "activeAs": [a.name for a in actives if (a.folder, a.digest) == (snapshot.folder, snapshot.digest)],
        "readers": sorted(readers.get(snapshot.digest, [])),
        "publishedAt": max((revision.published_at for revision in manifest.revisions), default=0),
        "folder": str(snapshot.commit_folder()),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("digest", "source", "revision", "commit", "files", "size", "active as", "readers"),
        [
            (
                row["digest"][:12],
                row["repoId"],
                row["requested"] or "-",
                row["commit"][:12],
                str(row["files"]),
                format_bytes(row["bytes"]),
                ",".join(row["activeAs"]) or "-",
                str(len(row["readers"])),
            )
            for row in rows
        ],
        right=(4, 5, 7),
    )


COMMAND = Command(
    name="ls",
    summary="list the snapshots of a volume",
    description=(
        "Lists the published snapshots of a volume: source, revision, size, under which names each is active, and "
        "how many readers hold a lease on it (renewed in the last 10 minutes). Writes nothing."
    ),
    examples=(
        ("modelcache ls", "list the default volume"),
        ("modelcache ls --volume /mnt/models --json | jq -r '.snapshots[].digest'", "all digests, in full"),
    ),
    add_options=_add_options,
    run=_run,
    reasons=(Reason.NOT_A_VOLUME, Reason.NEWER_FORMAT, Reason.CORRUPT_BLOB),
    environment=VOLUME_ENVIRONMENT,
)
