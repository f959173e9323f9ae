"""First stage: what does the spec stand for now? Runs plan Jobs and keeps their result in status.plan."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelcache_api.quantities import format_bytes, parse_duration
from modelcache_operator import attempts
from modelcache_operator.actions import Actions
from modelcache_operator.clock import format_time, parse_time
from modelcache_operator.conditions import RESOLVED, Condition
from modelcache_operator.observed import Observed
from modelcache_operator.resources import names
from modelcache_operator.resources.jobs import JobId, plan_job
from modelcache_operator.running import Busy, Done, Failed, Idle, advance
from modelcache_operator.settings import Settings

_KEPT = " What was resolved before stays in use."


@dataclass(frozen=True)
class Planned:
    """What is known about the source.

    Attributes:
        condition: Resolved.
        record: status.plan as it should be; {} if nothing was ever planned.
        valid: Whether the record answers the present spec.
    """

    condition: Condition
    record: Mapping[str, Any]
    valid: bool


def plan(observed: Observed, settings: Settings, actions: Actions, *, retry_fetch: bool) -> Planned:
    """Decide whether the source has to be looked at, and do so.

    Args:
        observed: What was read.
        settings: The operator's.
        actions: Takes what is to be done.
        retry_fetch: Whether a failed fetch is due again: then the source is looked at first, as it may have moved.
    """
    spec = observed.spec
    record = observed.status.get("plan") or {}
    key = names.plan_key(spec)
    valid = record.get("key") == key
    wait = _seconds_until_refresh(observed, record)
    due = not valid or record.get("reconcileAt", "") != observed.reconcile_at or retry_fetch or wait <= 0
    if not due:
        if wait != float("inf"):
            actions.look_again(wait)
        return Planned(_resolved(observed, record), record, valid)
    if spec.suspend:
        condition = (
            _resolved(observed, record)
            if valid
            else Condition(RESOLVED, "False", "Suspended", "spec.suspend is true: the source is not looked at.")
        )
        return Planned(condition, record, valid)

    return _look(observed, settings, actions, record, key)


def _look(observed: Observed, settings: Settings, actions: Actions, record: Mapping[str, Any], key: str) -> Planned:
    """Look at the source with a plan Job; what was known before stays in use meanwhile."""
    valid = record.get("key") == key

    def job(attempt: int) -> JobId:
        round_ = int(record.get("round", 0)) + 1
        return JobId(names.PLAN, key, round_, observed.reconcile_at, attempt)

    def build(attempt: int) -> names.Object:
        return plan_job(observed.cr, observed.spec, settings, job(attempt))

    outcome = advance(observed, settings, actions, job(1), build)
    if isinstance(outcome, Failed) and observed.now >= outcome.retry_at:
        outcome = outcome.again(observed, actions, build)
    match outcome:
        case Done():
            record = {
                "key": key,
                "commit": str(outcome.result["commit"]),
                "bytes": int(outcome.result["bytes"]),
                "files": int(outcome.result["files"]),
                "round": int(record.get("round", 0)) + 1,
                "time": format_time(outcome.finished),
                "reconcileAt": observed.reconcile_at,
            }
            return Planned(_resolved(observed, record), record, valid=True)
        case Failed():
            actions.look_again(outcome.retry_at - observed.now)
            return Planned(_failed(observed, outcome.failure, settings, valid=valid), record, valid)
        case Idle():
            waiting = Condition(RESOLVED, "Unknown", outcome.reason, outcome.message)
            return Planned(_resolved(observed, record) if valid else waiting, record, valid)
        case Busy():
            return Planned(_busy(observed, outcome, settings, record, valid=valid), record, valid)


def _busy(observed: Observed, busy: Busy, settings: Settings, record: Mapping[str, Any], *, valid: bool) -> Condition:
    if valid and busy.failure is None and busy.is_made:  # a look for what is new changes nothing until it is done
        return _resolved(observed, record)
    if busy.obstacle is not None:  # what is in the way now says more than why an earlier pod ended
        reason, message = busy.obstacle
        return Condition(RESOLVED, "False", reason, message + (_KEPT if valid else ""))
    if busy.failure is not None:
        return _failed(observed, busy.failure, settings, valid=valid)
    return Condition(RESOLVED, "Unknown", "Planning", f"Looking at {observed.spec.repo_id}.")


def _resolved(observed: Observed, record: Mapping[str, Any]) -> Condition:
    spec = observed.spec
    what = f"{spec.repo_id} {spec.requested_revision}".strip()
    text = (
        f"{what} is {record.get('commit')}: {record.get('files')} files, {format_bytes(int(record.get('bytes', 0)))}."
    )
    return Condition(RESOLVED, "True", "Resolved", text)


def _failed(observed: Observed, failure: attempts.Failure, settings: Settings, *, valid: bool) -> Condition:
    kept = _KEPT if valid else ""
    text = failure.message + kept + retry_sentence(observed, failure, settings)
    return Condition(RESOLVED, "False", failure.reason, text)


def retry_sentence(observed: Observed, failure: attempts.Failure, settings: Settings) -> str:
    """When a failure is tried again, and how to have it tried at once."""
    if not failure.permanent:
        return " It is tried again by itself."
    minutes = settings.retry_seconds / 60
    which = f"--namespace={observed.cr['metadata']['namespace']} mc/{observed.name}"
    return (
        f" It is tried again at most every {minutes:g} minutes; at once after a change of spec or "
        f'`kubectl annotate --overwrite {which} {names.RECONCILE_AT}="$(date)"`.'
    )


def _seconds_until_refresh(observed: Observed, record: Mapping[str, Any]) -> float:
    """How long what is known is good; infinity without spec.refresh."""
    if observed.spec.refresh is None or not record.get("time"):
        return float("inf")
    interval = parse_duration(observed.spec.refresh.interval)
    spread = int(hashlib.sha256(observed.uid.encode()).hexdigest()[:4], 16) / 0xFFFF
    return parse_time(record["time"]) + interval * (1 + spread / 10) - observed.now
