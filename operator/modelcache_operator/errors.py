"""What can go wrong between the operator and the cluster."""

import json
from collections.abc import Mapping
from typing import Any, Self


class OperatorError(Exception):
    """Base of all errors of the operator."""


class ApiUnreachable(OperatorError):
    """The API server did not answer: connection refused, reset, or no reply in time. Always worth a retry."""


class LeadershipLost(OperatorError):
    """Another replica may lead now; this process must stop acting at once."""


class ApiError(OperatorError):
    """The API server answered with an error status.

    Attributes:
        status: The HTTP status.
        reason: The ``reason`` of the Status object, such as ``AlreadyExists``.
        retry_after: Seconds the server asked us to wait; 0 if it did not.
    """

    def __init__(self, status: int, reason: str, message: str, *, retry_after: float = 0.0, request: str = "") -> None:
        super().__init__(f"{request}: {status} {reason}: {message}" if request else f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @classmethod
    def from_response(cls, status: int, body: bytes, headers: Mapping[str, str], request: str) -> Self:
        """Read the Status object of an error reply; a proxy's HTML counts as no message."""
        try:
            decoded: Any = json.loads(body)
        except ValueError:
            decoded = {}
        details = decoded if isinstance(decoded, dict) else {}
        after = headers.get("Retry-After", "")
        return cls(
            status,
            str(details.get("reason") or "Unknown"),
            str(details.get("message") or "no message"),
            retry_after=float(after) if after.isdigit() else 0.0,
            request=request,
        )

    @property
    def is_refusal(self) -> bool:
        """Whether the server understood and said no: the object or the rules must change before a retry can help."""
        is_webhook = self.status == 500 and "failed calling webhook" in self.message  # the server itself is well
        return is_webhook or self.status in {400, 403, 422}

    @property
    def is_conflict(self) -> bool:
        """Whether what we read is not what is: read again."""
        return self.status in {404, 409, 410}
