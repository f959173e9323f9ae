"""What should be done about one ModelCache, from what was read: pure, so that every state can be tried in a test.

Four stages, each of which looks only at what was observed and at the stages before it: `planning` (what the spec stands
for), `storing` (the volume), `fetching` (is it there and active), `serving` (the servers). Whatever they decide is a
function of the cluster's state, so the process can be killed between any two calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcache_api.quantities import format_bytes
from modelcache_operator import attempts, conditions
from modelcache_operator.actions import Actions, Note
from modelcache_operator.asking import NO_ANSWER, STATUS_PORT
from modelcache_operator.clock import format_time
from modelcache_operator.conditions import READY, UP_TO_DATE, Condition
from modelcache_operator.fetching import Active, Fetched, fetch, retry_is_due
from modelcache_operator.observed import Observed, Slot
from modelcache_operator.planning import Planned, plan
from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object
from modelcache_operator.serving import Served, serve
from modelcache_operator.settings import Settings
from modelcache_operator.storing import Stored, store

SILENT_SECONDS = 60.0
"""How long after a fetch servers that do not answer are waited for."""


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        creates: Jobs to create.
        applies: Objects to apply, in this order.
        deletes: Live objects to delete.
        status: The whole status as it should be.
        notes: Events to write.
        asks: Budgets to ask; then reconcile again with the answers.
        requeue_after: Seconds until the next look; None: only when something changes, or at the resync.
    """

    creates: Sequence[Object]
    applies: Sequence[Object]
    deletes: Sequence[Object]
    status: Mapping[str, Any]
    notes: Sequence[Note]
    asks: frozenset[Slot]
    requeue_after: float | None


def reconcile(observed: Observed, settings: Settings) -> Decision:
    """Decide what to do about one ModelCache that is not being deleted."""
    actions = Actions()
    planned = plan(observed, settings, actions, retry_fetch=retry_is_due(observed, settings))
    stored = store(observed, actions, planned.record if planned.valid else None)
    fetched = fetch(observed, settings, actions, planned.record, stored, valid=planned.valid)
    served = serve(observed, settings, actions, stored, fetched.active)
    up_to_date = _up_to_date(observed, actions, planned, fetched, served)
    ready = _ready(fetched, served, up_to_date)
    wanted = [planned.condition, fetched.condition, served.condition, up_to_date, ready]
    _remove_old_jobs(observed, actions)
    return Decision(
        creates=actions.creates,
        applies=actions.applies,
        deletes=actions.deletes,
        status=_status(observed, planned, stored, fetched, served, wanted),
        notes=actions.notes,
        asks=frozenset(actions.asks),
        requeue_after=actions.requeue_after,
    )


def _up_to_date(observed: Observed, actions: Actions, planned: Planned, fetched: Fetched, served: Served) -> Condition:
    """Whether what is served is what the spec asks for: the first stage that is not done says why not."""
    if not planned.valid:
        return Condition(UP_TO_DATE, "False", planned.condition.reason, planned.condition.message)
    if not fetched.condition.is_true:
        return Condition(UP_TO_DATE, "False", fetched.condition.reason, fetched.condition.message)
    if served.is_wanted and not served.condition.is_true:
        return Condition(UP_TO_DATE, "False", served.condition.reason, served.condition.message)
    if served.behind is not None:
        return Condition(UP_TO_DATE, "False", *served.behind)
    active = fetched.active
    if active is None:
        raise AssertionError("Fetched is True although nothing is active")
    if served.is_wanted and (announcing := _announcing(observed, actions, active.digest)) is not None:
        return announcing
    what = f" ({active.requested})" if active.requested else ""
    return Condition(UP_TO_DATE, "True", "UpToDate", f"Revision {active.commit}{what} is what the spec asks for.")


def _announcing(observed: Observed, actions: Actions, digest: str) -> Condition | None:
    """What servers do not announce yet."""
    announced = observed.announced or frozenset()
    if announced - {digest, NO_ANSWER}:
        actions.look_again(1)
        return Condition(UP_TO_DATE, "False", "Announcing", "Servers are warming up the new revision.")
    if NO_ANSWER not in announced:
        return None
    text = f"Whether all servers serve it already is not known: one does not answer on its port {STATUS_PORT}"
    if observed.now < observed.fetched_at + SILENT_SECONDS:
        actions.look_again(2)
        return Condition(UP_TO_DATE, "False", "Announcing", f"{text} in time.")
    actions.notes.append(Note("NoAnswer", f"{text}; let the operator reach it (NetworkPolicy).", warning=True))
    return None


def _ready(fetched: Fetched, served: Served, up_to_date: Condition) -> Condition:
    """Whether the model can be read, whichever revision."""
    if fetched.active is None:
        return Condition(READY, "False", up_to_date.reason, up_to_date.message)
    if not served.is_wanted:
        return Condition(READY, "True", "MountOnly", f"Revision {fetched.active.commit} is on the volume.")
    if served.condition.is_true:
        return Condition(READY, "True", "Serving", f"Revision {fetched.active.commit} is served.")
    return Condition(READY, "False", served.condition.reason, served.condition.message)


def _status(
    observed: Observed,
    planned: Planned,
    stored: Stored,
    fetched: Fetched,
    served: Served,
    wanted: Sequence[Condition],
) -> dict[str, Any]:
    status: dict[str, Any] = {
        "observedGeneration": observed.generation,
        "conditions": conditions.merge(
            wanted,
            observed.status.get("conditions") or [],
            generation=observed.generation,
            now=format_time(observed.now),
        ),
        "volume": {"claimName": stored.name},
        "server": served.server,
    }
    if served.endpoint:
        status["endpoint"] = served.endpoint
    if fetched.plan:
        status["plan"] = dict(fetched.plan)
    if fetched.progress:
        status["progress"] = dict(fetched.progress)
    revision: dict[str, Any] = {"requested": observed.spec.requested_revision}
    if planned.valid and fetched.plan.get("commit"):
        revision["resolved"] = fetched.plan["commit"]
    status["revision"] = revision
    if fetched.active is not None:
        _add_active(status, fetched.active)
    elif stored.claim is None:
        _keep_active(status, observed.status)
    return status


def _keep_active(status: dict[str, Any], old: Mapping[str, Any]) -> None:
    """The claim cannot be used just now: what was active on it is not forgotten."""
    status |= {name: old[name] for name in ("fetch", "digest", "files", "bytes", "size") if name in old}
    revision = old.get("revision") or {}
    kept = ("active", "activeRequested", "short", "previous")
    status["revision"] |= {name: revision[name] for name in kept if name in revision}


def _add_active(status: dict[str, Any], active: Active) -> None:
    status["fetch"] = dict(active.record)
    status["digest"] = active.digest
    status["files"] = active.files
    status["bytes"] = active.bytes
    status["size"] = format_bytes(active.bytes)
    status["revision"] |= {
        "active": active.commit,
        "activeRequested": active.requested,
        "short": active.commit[:12],
        "previous": [dict(p) for p in active.previous],
    }


def _remove_old_jobs(observed: Observed, actions: Actions) -> None:
    """Stop Jobs that no stage waits for, and keep of each component the newest finished one for its logs."""
    for component in (names.PLAN, names.FETCH):
        mine = [
            attempts.read(job)
            for job in observed.jobs
            if observed.owns(job) and (job["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL) == component
        ]
        finished = sorted((a for a in mine if a.state != "running"), key=lambda a: (a.finished, a.number))
        for attempt in finished[:-1]:
            actions.remove(attempt.job)
        for attempt in mine:
            if attempt.state == "running" and attempt.job["metadata"]["name"] not in actions.awaited:
                actions.remove(attempt.job)
