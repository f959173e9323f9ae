"""Any exception as an exit code and one sentence: the only place that decides what a user sees of an error."""

import errno

from modelcache_api.reasons import REASONS, USAGE, Reason

OPERATING_SYSTEM_ERROR = 1

_VOLUME_REASONS = {
    "NotAVolume": Reason.NOT_A_VOLUME,
    "NewerFormat": Reason.NEWER_FORMAT,
    "VolumeBusy": Reason.VOLUME_BUSY,
    "NoSpace": Reason.NO_SPACE,
    "SnapshotNotFound": Reason.SNAPSHOT_NOT_FOUND,
    "NoActiveRevision": Reason.SNAPSHOT_NOT_FOUND,
    "FileNotInSnapshot": Reason.SNAPSHOT_NOT_FOUND,
    "InvalidPath": Reason.INVALID_SOURCE,
    "BadWeights": Reason.BAD_WEIGHTS,
    "BadManifest": Reason.CORRUPT_BLOB,
    "CorruptBlob": Reason.CORRUPT_BLOB,
    "ChecksumMismatch": Reason.CHECKSUM_MISMATCH,
}
_EXTRAS = {
    "pydantic": "fetch",
    "yaml": "fetch",
    "huggingface_hub": "fetch",
    "boto3": "fetch",
    "botocore": "fetch",
    "awscrt": "fetch",
    "google": "fetch",
    "tqdm": "fetch",
    "grpc_health": "server",
    "grpc_reflection": "server",
    "grpc_status": "server",
    "jwt": "server",
    "prometheus_client": "server",
    "redis": "server",
}


class CommandError(Exception):
    """A command cannot go on.

    Attributes:
        reason: The row of the table of exit codes.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UsageError(Exception):
    """The command line cannot be understood, beyond what argparse finds."""

    exit_code = USAGE


class OutputError(Exception):
    """Standard output takes nothing more: the disk behind it is full, or gone."""

    exit_code = OPERATING_SYSTEM_ERROR


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the text (usually one sentence) for an error.

    Errors of the project's parts carry their reason, or are a volume's; a missing package names the extra to install;
    everything unknown is a bug and says so.
    """
    reason = getattr(error, "reason", None)
    if isinstance(reason, Reason):
        return REASONS[reason].exit_code, str(error)
    if isinstance(error, UsageError | OutputError):
        return error.exit_code, str(error)
    for cls in type(error).__mro__:
        if cls.__module__ == "modelcache_volume.errors":
            volume_reason = _VOLUME_REASONS.get(cls.__name__)
            return (REASONS[volume_reason].exit_code if volume_reason else OPERATING_SYSTEM_ERROR), str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        message = f"this command needs the package {error.name}: pip install 'modelcache[{extra}]'"
        return REASONS[Reason.NOT_INSTALLED].exit_code, message
    if isinstance(error, OSError):
        return _operating_system(error)
    message = f"unexpected {type(error).__name__}: {error}; this is probably a bug: run with --debug and report it"
    return REASONS[Reason.INTERNAL].exit_code, message


def _operating_system(error: OSError) -> tuple[int, str]:
    what = error.strerror or str(error)
    message = f"{error.filename}: {what}" if error.filename else what
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return REASONS[Reason.NO_SPACE].exit_code, f"{message}; make room and run it again"
    if error.errno == errno.EADDRINUSE:
        return REASONS[Reason.PORT_IN_USE].exit_code, f"{message}; choose another port, 0 for any free one"
    return OPERATING_SYSTEM_ERROR, message
