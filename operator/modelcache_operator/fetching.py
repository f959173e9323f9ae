"""Third stage: is what the spec asks for on the volume and active? Runs fetch Jobs, remembers in status.fetch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelcache_api.quantities import format_bytes
from modelcache_operator import attempts
from modelcache_operator.actions import Actions, Note
from modelcache_operator.clock import parse_time
from modelcache_operator.conditions import FETCHED, Condition
from modelcache_operator.observed import Observed
from modelcache_operator.planning import retry_sentence
from modelcache_operator.resources import claim as claims
from modelcache_operator.resources import names
from modelcache_operator.resources.jobs import JobId, fetch_job
from modelcache_operator.running import Busy, Done, Failed, Idle, advance, last_attempt
from modelcache_operator.settings import Settings
from modelcache_operator.storing import Stored, active_on


@dataclass(frozen=True)
class Active:
    """What is active on the volume: the part of status that a fetch decides."""

    record: Mapping[str, Any]
    requested: str
    commit: str
    digest: str
    files: int
    bytes: int
    previous: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Fetched:
    """How far the volume is.

    Attributes:
        condition: Fetched.
        active: What is active on the present claim; None: nothing.
        plan: status.plan, with the commit that was really fetched.
        progress: status.progress while a fetch runs.
    """

    condition: Condition
    active: Active | None
    plan: Mapping[str, Any]
    progress: Mapping[str, Any] = field(default_factory=dict)


def retry_is_due(observed: Observed, settings: Settings) -> bool:
    """Whether the newest fetch failed after the last look at the source, and long enough ago."""
    record = observed.status.get("plan") or {}
    claim = observed.claim
    if not record or claim is None or record.get("key") != names.plan_key(observed.spec):
        return False
    last = last_attempt(observed, _job_id(observed, record["commit"], claim["metadata"]["uid"], 1))
    if last is None or last.state != "failed" or parse_time(record["time"]) > last.finished:
        return False
    failure = attempts.failure(last, observed.pods)
    return observed.now >= attempts.retry_at(last, failure, observed, settings.retry_seconds)


def remembered(observed: Observed, claim: names.Object | None) -> Active | None:
    """What status says is active on this claim."""
    if not active_on(observed, claim):
        return None
    status = observed.status
    revision = status.get("revision") or {}
    return Active(
        record=status["fetch"],
        requested=str(revision.get("activeRequested", "")),
        commit=str(revision.get("active", "")),
        digest=str(status.get("digest", "")),
        files=int(status.get("files") or 0),
        bytes=int(status.get("bytes") or 0),
        previous=revision.get("previous") or [],
    )


def fetch(
    observed: Observed, settings: Settings, actions: Actions, plan: Mapping[str, Any], stored: Stored, *, valid: bool
) -> Fetched:
    """Decide whether a fetch is needed, and drive it.

    Args:
        observed: What was read.
        settings: The operator's.
        actions: Takes what is to be done.
        plan: status.plan.
        stored: The volume.
        valid: Whether the plan answers the present spec.
    """
    active = remembered(observed, stored.claim)
    if stored.problem is not None:
        return Fetched(_problem(observed, stored), active, plan)
    if not valid:
        text = "What the spec asks for has to be resolved first."
        return Fetched(Condition(FETCHED, "False", "NotResolved", text), active, plan)
    key = names.fetch_key(observed.spec, plan["commit"])
    if active is not None and active.record.get("key") == key:
        text = f"{active.files} files, {format_bytes(active.bytes)}, are on the volume and verified."
        return Fetched(Condition(FETCHED, "True", "Fetched", text + stored.note), active, plan)
    if (waiting := _has_to_wait(observed, actions, stored, plan)) is not None:
        return Fetched(waiting, active, plan)

    return _drive(observed, settings, actions, plan, stored, active)


def _drive(
    observed: Observed,
    settings: Settings,
    actions: Actions,
    plan: Mapping[str, Any],
    stored: Stored,
    active: Active | None,
) -> Fetched:
    """Fetch with a Job; what is active stays so meanwhile."""

    def build(attempt: int) -> names.Object:
        many_nodes = claims.many_nodes(observed.spec, stored.claim)
        job = _job_id(observed, plan["commit"], stored.uid, attempt)
        return fetch_job(observed.cr, observed.spec, settings, job, claim=stored.name, many_nodes=many_nodes)

    outcome = advance(observed, settings, actions, _job_id(observed, plan["commit"], stored.uid, 1), build)
    if isinstance(outcome, Failed) and parse_time(plan["time"]) > outcome.finished:
        outcome = outcome.again(observed, actions, build)
    match outcome:
        case Done():
            return _done(observed, actions, outcome.result, plan, stored, active)
        case Failed():
            if outcome.retry_at > observed.now:  # else the source is being looked at first
                actions.look_again(outcome.retry_at - observed.now)
            return Fetched(_failed(observed, outcome.failure, settings, active, stored.note), active, plan)
        case Idle():
            return Fetched(Condition(FETCHED, "False", outcome.reason, outcome.message), active, plan)
        case Busy():
            return Fetched(
                _busy(observed, outcome, settings, active, plan, stored),
                active,
                plan,
                _progress(observed, outcome, plan),
            )


def _job_id(observed: Observed, commit: str, claim_uid: str, attempt: int) -> JobId:
    round_ = int((observed.status.get("fetch") or {}).get("round", 0)) + 1
    return JobId(names.FETCH, names.fetch_key(observed.spec, commit), round_, claim_uid, attempt)


def _problem(observed: Observed, stored: Stored) -> Condition:
    reason, message = stored.problem or ("", "")
    if observed.claim is not None and (warnings := observed.warnings.get(observed.claim["metadata"]["uid"])):
        message = f"{message} {warnings[-1]}"
    return Condition(FETCHED, "False", reason, message)


def _has_to_wait(observed: Observed, actions: Actions, stored: Stored, plan: Mapping[str, Any]) -> Condition | None:
    """What has to happen before a fetch may start."""
    if observed.spec.suspend:
        return Condition(FETCHED, "False", "Suspended", "spec.suspend is true: nothing is fetched.")
    job = _job_id(observed, plan["commit"], stored.uid, 1)
    if stored.growing and last_attempt(observed, job) is None:
        actions.look_again(2)
        return Condition(FETCHED, "False", "GrowingVolume", f"The volume {stored.name} is being grown.")
    for pod in observed.pods:
        labels = pod["metadata"].get("labels") or {}
        ended = (pod.get("status") or {}).get("phase") in {"Succeeded", "Failed"}
        if labels.get(names.COMPONENT_LABEL) != names.FETCH or ended:
            continue
        owners = {r.get("name", "") for r in pod["metadata"].get("ownerReferences") or []}
        if not any(f"-{job.family}-" in owner for owner in owners):
            stuck = attempts.not_ending(pod, observed.now)
            actions.look_again(10 if stuck else 1)
            text = "A fetch of what was asked for before is being stopped."
            return Condition(FETCHED, "False", *(stuck or ("Waiting", text)))
    return None


def _done(
    observed: Observed,
    actions: Actions,
    result: Mapping[str, Any],
    plan: Mapping[str, Any],
    stored: Stored,
    before: Active | None,
) -> Fetched:
    spec = observed.spec
    commit = str(result["commit"])
    previous = list(before.previous) if before is not None else []
    if before is not None and before.digest != result["digest"]:
        previous.insert(0, {"requested": before.requested, "commit": before.commit, "digest": before.digest})
    kept = [p for p in previous if p.get("digest") != result["digest"]][: spec.revision_history_limit]
    record = {
        "key": names.fetch_key(spec, commit),
        "claimUid": stored.uid,
        "round": int((observed.status.get("fetch") or {}).get("round", 0)) + 1,
    }
    active = Active(
        record, spec.requested_revision, commit, str(result["digest"]), int(result["files"]), int(result["bytes"]), kept
    )
    downloaded = format_bytes(int(result.get("downloadedBytes", 0)))
    text = f"{active.files} files, {format_bytes(active.bytes)}, are on the volume and verified."
    actions.notes.append(Note("Activated", f"Revision {commit} is active: {text} {downloaded} were downloaded."))
    return Fetched(Condition(FETCHED, "True", "Fetched", text), active, {**plan, "commit": commit})


def _failed(
    observed: Observed, failure: attempts.Failure, settings: Settings, active: Active | None, note: str
) -> Condition:
    kept = f" Revision {active.commit} stays served." if active is not None else ""
    text = failure.message + note + kept + retry_sentence(observed, failure, settings)
    return Condition(FETCHED, "False", failure.reason, text)


def _busy(
    observed: Observed,
    busy: Busy,
    settings: Settings,
    active: Active | None,
    plan: Mapping[str, Any],
    stored: Stored,
) -> Condition:
    if busy.obstacle is not None:  # what is in the way now says more than why an earlier pod ended
        reason, message = busy.obstacle
        warnings = observed.warnings.get(stored.uid) or ()
        return Condition(FETCHED, "False", reason, " ".join([message, *warnings[-1:]]))
    if busy.failure is not None:
        return _failed(observed, busy.failure, settings, active, stored.note)
    text = f"{plan['files']} files, {format_bytes(int(plan['bytes']))}, are being fetched by Job {busy.job}."
    return Condition(FETCHED, "False", "Fetching", text + stored.note)


def _progress(observed: Observed, busy: Busy, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    said = observed.progress or {}
    old = observed.status.get("progress") or {}
    if not said and old.get("attempt") == busy.attempt:
        return dict(old)
    have, total = int(said.get("bytes", 0)), int(said.get("totalBytes", 0)) or int(plan["bytes"])
    return {
        "bytes": max(have, 0),
        "totalBytes": total,
        "bytesPerSecond": max(int(said.get("bytesPerSecond", 0)), 0),
        "attempt": busy.attempt,
        "percent": f"{min(100, max(have, 0) * 100 // total) if total else 100}%",
    }
