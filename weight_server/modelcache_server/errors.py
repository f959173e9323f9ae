"""What can go wrong with a request, in one table: the reason's name, its gRPC code and its HTTP status."""

from dataclasses import dataclass
from enum import StrEnum

import grpc

from modelcache_volume import CorruptBlob, FileNotInSnapshot, SnapshotNotFound, VolumeError


class Reason(StrEnum):
    """Why a request failed; sent as the trailing metadata `modelcache-reason` and as the ErrorInfo's reason."""

    REVISION_GONE = "REVISION_GONE"
    NOT_READY = "NOT_READY"
    UNKNOWN_REPO = "UNKNOWN_REPO"
    UNKNOWN_REF = "UNKNOWN_REF"
    NO_SUCH_FILE = "NO_SUCH_FILE"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    PRECONDITION_FAILED = "PRECONDITION_FAILED"
    INVALID_REQUEST = "INVALID_REQUEST"
    CORRUPT_BLOB = "CORRUPT_BLOB"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    VOLUME_UNAVAILABLE = "VOLUME_UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


@dataclass(frozen=True)
class ReasonInfo:
    """How a reason looks on each lane: the gRPC code, the HTTP status and the value of `X-Error-Code`."""

    grpc_code: grpc.StatusCode
    http_status: int
    http_code: str


REASONS: dict[Reason, ReasonInfo] = {
    Reason.REVISION_GONE: ReasonInfo(grpc.StatusCode.NOT_FOUND, 404, "RevisionGone"),
    Reason.NOT_READY: ReasonInfo(grpc.StatusCode.NOT_FOUND, 503, "NotReady"),
    Reason.UNKNOWN_REPO: ReasonInfo(grpc.StatusCode.NOT_FOUND, 404, "RepoNotFound"),
    Reason.UNKNOWN_REF: ReasonInfo(grpc.StatusCode.NOT_FOUND, 404, "RevisionNotFound"),
    Reason.NO_SUCH_FILE: ReasonInfo(grpc.StatusCode.INVALID_ARGUMENT, 404, "EntryNotFound"),
    Reason.OUT_OF_RANGE: ReasonInfo(grpc.StatusCode.INVALID_ARGUMENT, 416, "OutOfRange"),
    Reason.PRECONDITION_FAILED: ReasonInfo(grpc.StatusCode.FAILED_PRECONDITION, 412, "PreconditionFailed"),
    Reason.INVALID_REQUEST: ReasonInfo(grpc.StatusCode.INVALID_ARGUMENT, 400, "InvalidRequest"),
    Reason.CORRUPT_BLOB: ReasonInfo(grpc.StatusCode.DATA_LOSS, 500, "CorruptBlob"),
    Reason.RESOURCE_EXHAUSTED: ReasonInfo(grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "ResourceExhausted"),
    Reason.VOLUME_UNAVAILABLE: ReasonInfo(grpc.StatusCode.UNAVAILABLE, 503, "VolumeUnavailable"),
    Reason.UNAUTHENTICATED: ReasonInfo(grpc.StatusCode.UNAUTHENTICATED, 401, "Unauthenticated"),
    Reason.PERMISSION_DENIED: ReasonInfo(grpc.StatusCode.PERMISSION_DENIED, 403, "PermissionDenied"),
}


class ServerError(Exception):
    """The server cannot start or go on; the text says what happened and what the operator of it can do."""


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        reason: what went wrong, as in the table above.
        retry_after: seconds after which the same request may succeed; None where a retry does not help.
    """

    def __init__(self, reason: Reason, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after

    @property
    def info(self) -> ReasonInfo:
        """How this error looks on each lane."""
        return REASONS[self.reason]


def as_request_error(error: Exception) -> RequestError | None:
    """The answer to an exception of the volume or the operating system; None for a bug of ours."""
    match error:
        case RequestError():
            return error
        case SnapshotNotFound():
            return RequestError(Reason.REVISION_GONE, str(error))
        case FileNotInSnapshot():
            return RequestError(Reason.NO_SUCH_FILE, str(error))
        case CorruptBlob():
            return RequestError(Reason.CORRUPT_BLOB, str(error))
        case VolumeError() | OSError():
            return RequestError(
                Reason.VOLUME_UNAVAILABLE, f"The volume cannot be read now: {error}. Retry later.", retry_after=1.0
            )
        case _:
            return None
