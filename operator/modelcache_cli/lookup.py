"""Finding snapshots on a volume by what a user types."""

from typing import TYPE_CHECKING

from modelcache_api.reasons import Reason
from modelcache_cli.failures import CommandError

if TYPE_CHECKING:
    from modelcache_volume import Snapshot, Volume


def snapshots_of(volume: "Volume", prefix: str) -> list["Snapshot"]:
    """The snapshots of one digest (one for each source that has these bytes).

    Args:
        volume: Where to look.
        prefix: The digest or its first characters.

    Raises:
        CommandError: None or several digests begin so.
    """
    found = [snapshot for snapshot in volume.snapshots() if snapshot.digest.startswith(prefix)]
    digests = sorted({snapshot.digest for snapshot in found})
    if not digests:
        raise CommandError(
            Reason.SNAPSHOT_NOT_FOUND, f"no snapshot on {volume.root} has the digest {prefix}; see `modelcache ls`"
        )
    if len(digests) > 1:
        raise CommandError(
            Reason.SNAPSHOT_NOT_FOUND, f"{len(digests)} snapshots begin with {prefix}; write more of {digests[0]}"
        )
    return found
