"""Drives the Jobs of one thing to do: creates the first attempt, reads the last one, makes the next one. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelcache_operator import attempts
from modelcache_operator.actions import Actions
from modelcache_operator.attempts import Attempt, Failure
from modelcache_operator.observed import Observed, Slot, conflict_text, is_deleting
from modelcache_operator.resources.jobs import JobId
from modelcache_operator.resources.names import Object
from modelcache_operator.settings import Settings

SLOT_WAIT_SECONDS = 60.0
"""Whose turn it is is woken; this is only for a turn that nobody saw come free."""
PROGRESS_SECONDS = 10.0

Build = Callable[[int], Object]


@dataclass(frozen=True)
class Done:
    """The last attempt succeeded."""

    result: Mapping[str, Any]
    finished: float


@dataclass(frozen=True)
class Busy:
    """An attempt is running, or was asked for a moment ago.

    Attributes:
        attempt: Its number.
        failure: Why the one before, or an earlier pod of this one, failed.
        obstacle: (reason, message) of what keeps its pod from running.
        job: The Job's name.
        is_made: Whether there can be a pod: nothing ever comes of a Job that cannot even be made.
    """

    attempt: int
    job: str
    failure: Failure | None = None
    obstacle: tuple[str, str] | None = None
    is_made: bool = True

    @property
    def is_troubled(self) -> bool:
        """Whether something went wrong that may go wrong again."""
        return self.failure is not None or self.obstacle is not None


@dataclass(frozen=True)
class Idle:
    """Nothing runs, and something else has to happen first."""

    reason: str
    message: str


@dataclass(frozen=True)
class Failed:
    """The last attempt failed.

    Attributes:
        failure: Why.
        finished: When, in seconds since the epoch.
        retry_at: When the next attempt is due.
        last: The attempt.
        slot: The budget that the next attempt needs.
    """

    failure: Failure
    finished: float
    retry_at: float
    last: Attempt
    slot: Slot

    def again(self, observed: Observed, actions: Actions, build: Build) -> "Busy | Idle":
        """Make the next attempt."""
        return _create(observed, actions, self.slot, build(self.last.number + 1), self.last.number + 1, self.failure)


Outcome = Done | Busy | Idle | Failed


def last_attempt(observed: Observed, job: JobId) -> Attempt | None:
    """The newest attempt there is."""
    found = attempts.of_family(observed, job.component, job.family)
    return found[-1] if found else None


def advance(observed: Observed, settings: Settings, actions: Actions, job: JobId, build: Build) -> Outcome:
    """Read the newest attempt; create the first one if there is none.

    A complete Job whose result went with its pod is done again. A failed one is reported: the stage decides when to go
    on.
    """
    slot: Slot = "plan" if job.component == "plan" else "fetch"
    found = attempts.of_family(observed, job.component, job.family)
    if not found:
        return _create(observed, actions, slot, build(1), 1, None)
    last = found[-1]
    if last.state == "complete":
        result = attempts.result(last, observed.pods)
        if result is not None:
            return Done(result, last.finished or observed.now)
        return _create(observed, actions, slot, build(last.number + 1), last.number + 1, None)
    if last.state == "failed":
        failure = attempts.failure(last, observed.pods)
        due = attempts.retry_at(last, failure, observed, settings.retry_seconds)
        return Failed(failure, last.finished, due, last, slot)
    pods = attempts.pods_of(last.job, observed.pods)
    busy = _running(observed, found, pods)
    if busy.is_troubled and attempts.is_made_otherwise(last.job, build(last.number)):
        # it may wait for ever for what has been mended in the spec or the chart since: the next one takes its place
        return _create(observed, actions, slot, build(last.number + 1), last.number + 1, busy.failure)
    actions.look_again(PROGRESS_SECONDS)
    actions.awaited.add(busy.job)
    # no trouble that another attempt may take the place of: this one may still write
    stuck = attempts.not_ending(pods[-1], observed.now) if pods else None
    return replace(busy, obstacle=busy.obstacle or stuck)


def _running(observed: Observed, found: list[Attempt], pods: list[Object]) -> Busy:
    last = found[-1]
    failure = next((f for pod in reversed(pods) if (f := attempts.pod_failure(pod)) is not None), None)
    if failure is None and len(found) > 1 and found[-2].state == "failed":
        failure = attempts.failure(found[-2], observed.pods)
    obstacle = attempts.obstacle(pods[-1], observed.warnings) if pods else None
    warnings = observed.warnings.get(last.uid) or ()
    if obstacle is None and not pods and warnings:
        obstacle = attempts.refused(warnings[-1])
    return Busy(last.number, last.job["metadata"]["name"], failure, obstacle)


def _create(
    observed: Observed, actions: Actions, slot: Slot, job: Object, number: int, failure: Failure | None
) -> Busy | Idle:
    name = job["metadata"]["name"]
    if (refusal := observed.refusals.get(("Job", name))) is not None:
        return Busy(number, name, failure, (refusal.reason, refusal.message), is_made=False)
    if (existing := next((j for j in observed.jobs if j["metadata"]["name"] == name), None)) is not None:
        if is_deleting(existing) or observed.leftover(existing):
            actions.look_again(1)
            return Idle("Waiting", f"Job {name} is being deleted.")
        actions.look_again(60)
        return Busy(number, name, failure, ("NameConflict", conflict_text(f"Job {name}")), is_made=False)
    if slot not in observed.slots:
        actions.asks.add(slot)
    elif not observed.slots[slot]:
        actions.look_again(SLOT_WAIT_SECONDS)
        return Idle("WaitingForTurn", f"As many {slot} Jobs run as the operator allows; this one waits for its turn.")
    else:
        actions.creates.append(job)
    return Busy(number, name, failure)
