"""Conditions as the Kubernetes API conventions want them, always in one order.

The order matters: an apply that only reorders the list bumps the resource version and wakes every watcher.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["True", "False", "Unknown"]

RESOLVED = "Resolved"
FETCHED = "Fetched"
SERVING = "Serving"
UP_TO_DATE = "UpToDate"
READY = "Ready"
ORDER = (RESOLVED, FETCHED, SERVING, UP_TO_DATE, READY)

MESSAGE_LIMIT = 4096
"""Characters; the CRD bounds every string, and a message must never make a status write fail."""


@dataclass(frozen=True)
class Condition:
    """One condition as reconcile wants it; time and generation are added by `merge`."""

    type: str
    status: Status
    reason: str
    message: str

    @property
    def is_true(self) -> bool:
        """Whether the status is ``True``."""
        return self.status == "True"


def merge(
    wanted: Iterable[Condition], old: Sequence[Mapping[str, Any]], *, generation: int, now: str
) -> list[dict[str, Any]]:
    """Turn wanted conditions into the list that goes into ``status.conditions``.

    Args:
        wanted: What reconcile decided; one per type.
        old: ``status.conditions`` as read.
        generation: ``metadata.generation`` of the object that was judged.
        now: RFC 3339 time for conditions whose status changes.

    Returns:
        The conditions in `ORDER`; ``lastTransitionTime`` is kept where the status did not change.
    """
    before = {condition["type"]: condition for condition in old}
    by_type = {condition.type: condition for condition in wanted}
    merged = []
    for type_ in ORDER:
        condition = by_type[type_]
        previous = before.get(type_, {})
        unchanged = previous.get("status") == condition.status
        since = (previous.get("lastTransitionTime") if unchanged else None) or now
        merged.append(
            {
                "type": type_,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message[:MESSAGE_LIMIT],
                "lastTransitionTime": since,
                "observedGeneration": generation,
            }
        )
    return merged


def changes(new: Iterable[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conditions whose status or reason is not what it was: each of them is worth an Event."""
    before = {condition["type"]: (condition.get("status"), condition.get("reason")) for condition in old}
    return [c for c in new if before.get(c["type"]) != (c["status"], c["reason"])]
