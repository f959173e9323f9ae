"""Why something failed: the one table of condition reasons and exit codes, shared by command line, Jobs and operator.

The codes are an interface: a Job's podFailurePolicy and users' scripts test them, so a code is never given another
meaning. 64 to 79 are permanent (the same input fails again until somebody changes something), 80 to 95 may heal by
trying again.
"""

from dataclasses import dataclass
from enum import StrEnum

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report SIGINT."""
TERMINATED = 143
"""Exit code after SIGTERM where the work was left unfinished, as shells report it."""
USAGE = 2
"""Exit code for a command line that cannot be understood."""


class Reason(StrEnum):
    """A condition's reason in status, and the name of an exit code."""

    INVALID_SPEC = "InvalidSpec"
    INVALID_SOURCE = "InvalidSource"
    AUTH_FAILED = "AuthFailed"
    SECRET_MISSING = "SecretMissing"  # noqa: S105 - a reason, not a secret
    NOT_FOUND = "NotFound"
    BAD_WEIGHTS = "BadWeights"
    NO_SPACE = "NoSpace"
    NOT_A_VOLUME = "NotAVolume"
    NEWER_FORMAT = "NewerFormat"
    SNAPSHOT_NOT_FOUND = "SnapshotNotFound"
    CORRUPT_BLOB = "CorruptBlob"
    PORT_IN_USE = "PortInUse"
    NOT_INSTALLED = "NotInstalled"
    RATE_LIMITED = "RateLimited"
    UNAVAILABLE = "Unavailable"
    STALLED = "Stalled"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    VOLUME_BUSY = "VolumeBusy"
    SPACE_HELD_BY_READERS = "SpaceHeldByReaders"
    NOT_READY = "NotReady"
    INTERNAL = "Internal"


@dataclass(frozen=True, slots=True)
class ReasonInfo:
    """What a reason means to whoever sees it.

    Attributes:
        exit_code: The process's exit code.
        permanent: Whether the same input fails again, so that a retry is useless.
        summary: What happened, as a clause without a full stop.
        remedy: What the user can do about it.
    """

    exit_code: int
    permanent: bool
    summary: str
    remedy: str


REASONS: dict[Reason, ReasonInfo] = {
    Reason.INVALID_SPEC: ReasonInfo(64, True, "the ModelCache manifest is refused", "correct the fields named"),
    Reason.INVALID_SOURCE: ReasonInfo(
        65, True, "the source cannot be read as a model, or names unsafe files", "correct repoId or endpoint"
    ),
    Reason.AUTH_FAILED: ReasonInfo(
        66, True, "the source refused the credentials (401, 403, gated)", "check the secret and its permissions"
    ),
    Reason.SECRET_MISSING: ReasonInfo(67, True, "a secret or one of its keys is missing", "create the secret"),
    Reason.NOT_FOUND: ReasonInfo(
        68, True, "no such repo, revision or bucket, or no file matches the patterns", "correct the spec"
    ),
    Reason.BAD_WEIGHTS: ReasonInfo(
        69, True, "a weight file is truncated, malformed or unsafe", "repair the source or leave the file out"
    ),
    Reason.NO_SPACE: ReasonInfo(70, True, "the volume is full", "enlarge the volume or prune it"),
    Reason.NOT_A_VOLUME: ReasonInfo(71, True, "the folder is no ModelCache volume", "name another folder"),
    Reason.NEWER_FORMAT: ReasonInfo(
        72, True, "the volume was written by a newer ModelCache", "upgrade this one, or take another volume"
    ),
    Reason.SNAPSHOT_NOT_FOUND: ReasonInfo(
        73, True, "no such snapshot, revision or name on the volume or server", "see `modelcache ls`"
    ),
    Reason.CORRUPT_BLOB: ReasonInfo(
        74, True, "a file on the volume is not what was published", "run `modelcache fetch --verify`"
    ),
    Reason.PORT_IN_USE: ReasonInfo(75, True, "a port is taken by another program", "choose another port, 0 for any"),
    Reason.NOT_INSTALLED: ReasonInfo(
        76, True, "an optional part of ModelCache is not installed", "install the extra named"
    ),
    Reason.RATE_LIMITED: ReasonInfo(80, False, "the source answered 429 too often", "wait, or use a token"),
    Reason.UNAVAILABLE: ReasonInfo(
        81, False, "the source or server cannot be reached (5xx, DNS, TLS, timeouts)", "check the address and network"
    ),
    Reason.STALLED: ReasonInfo(82, False, "no byte came for stallTimeout", "check the network or raise stallTimeout"),
    Reason.CHECKSUM_MISMATCH: ReasonInfo(
        83, False, "downloaded bytes are not what the source promised", "try again; if it stays, the source is damaged"
    ),
    Reason.VOLUME_BUSY: ReasonInfo(84, False, "another process writes to the volume", "wait for it to end"),
    Reason.SPACE_HELD_BY_READERS: ReasonInfo(
        85, False, "the volume is full of snapshots that readers still use", "wait for the readers or enlarge it"
    ),
    Reason.NOT_READY: ReasonInfo(86, False, "it did not become ready in time", "see why it waits; raise --timeout"),
    Reason.INTERNAL: ReasonInfo(95, False, "an unexpected error, probably a bug", "run with --debug and report it"),
}
