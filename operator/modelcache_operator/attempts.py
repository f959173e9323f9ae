"""What the Jobs of one thing to do say: running, done with a result, or failed and why. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelcache_api.reasons import REASONS
from modelcache_operator.clock import parse_time
from modelcache_operator.observed import Observed, is_deleting
from modelcache_operator.resources import names
from modelcache_operator.resources.jobs import PLAN_DEADLINE_SECONDS
from modelcache_operator.resources.names import Object

TRANSIENT_BASE_SECONDS = 30.0
TERMINATING_SECONDS = 60.0
"""A pod that should have ended so long ago does not end by itself: its node is most likely gone."""
_BY_EXIT_CODE = {info.exit_code: reason for reason, info in REASONS.items()}
_PULL_ERRORS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG_ERRORS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class Failure:
    """Why a Job failed.

    Attributes:
        reason: CamelCase, a row of the shared table where the program itself said it.
        message: A sentence with what the user can do.
        permanent: Whether the same input fails again.
    """

    reason: str
    message: str
    permanent: bool


@dataclass(frozen=True)
class Attempt:
    """One Job, read.

    Attributes:
        job: As read.
        number: From 1.
        state: What it is doing.
        finished: Seconds since the epoch; 0 while it runs.
    """

    job: Object
    number: int
    state: Literal["running", "complete", "failed"]
    finished: float

    @property
    def uid(self) -> str:
        """The Job's uid."""
        return str(self.job["metadata"]["uid"])


def read(job: Object) -> Attempt:
    """Read a Job's conditions."""
    labels = job["metadata"].get("labels") or {}
    text = labels.get(names.ATTEMPT_LABEL, "")
    number = int(text) if text.isdigit() else 1
    status = job.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("status") != "True":
            continue
        if condition["type"] == "Complete":
            return Attempt(job, number, "complete", parse_time(condition.get("lastTransitionTime")))
        if condition["type"] == "Failed":
            return Attempt(job, number, "failed", parse_time(condition.get("lastTransitionTime")))
    return Attempt(job, number, "running", 0.0)


def of_family(observed: Observed, component: str, family: str) -> list[Attempt]:
    """All attempts at the same thing that are not being deleted, oldest first."""
    found = [
        read(job)
        for job in observed.jobs
        if (job["metadata"].get("labels") or {}).get(names.KEY_LABEL) == family
        and (job["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL) == component
        and observed.owns(job)
        and not is_deleting(job)
    ]
    return sorted(found, key=lambda attempt: attempt.number)


def pods_of(job: Object, pods: Sequence[Object]) -> list[Object]:
    """A Job's pods, oldest first."""
    uid = job["metadata"]["uid"]
    mine = [pod for pod in pods if any(r.get("uid") == uid for r in pod["metadata"].get("ownerReferences") or [])]
    return sorted(mine, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))


def result(attempt: Attempt, pods: Sequence[Object]) -> Mapping[str, Any] | None:
    """What a complete Job's program reported; None if that was lost with its pod."""
    for pod in reversed(pods_of(attempt.job, pods)):
        message = _message(pod)
        if message.get("result") in {"planned", "fetched"}:
            return message
    return None


def failure(attempt: Attempt, pods: Sequence[Object]) -> Failure:
    """Why a failed Job failed, from the most precise witness there is."""
    found = (pod_failure(pod) for pod in reversed(pods_of(attempt.job, pods)))
    of_pod = next((failed for failed in found if failed is not None), None)
    conditions = (attempt.job.get("status") or {}).get("conditions") or []
    of_job: Mapping[str, Any] = next((c for c in conditions if c.get("type") == "Failed"), {})
    if of_job.get("reason") == "DeadlineExceeded":  # its pods were killed for it, which is no news
        return _too_late(attempt.job, of_pod)
    if of_pod is not None:
        return of_pod
    text = str(of_job.get("message") or of_job.get("reason") or "no reason given")
    return Failure("JobFailed", f"Job {attempt.job['metadata']['name']} failed: {text}.", permanent=False)


def _too_late(job: Object, of_pod: Failure | None) -> Failure:
    name, seconds = job["metadata"]["name"], job["spec"].get("activeDeadlineSeconds")
    text = (
        f"Job {name} was ended after {seconds} s, its activeDeadlineSeconds; raise spec.fetch.activeDeadlineSeconds if "
        f"that is too short (a plan may take {PLAN_DEADLINE_SECONDS} s at most)."
    )
    if of_pod is not None and of_pod.reason in REASONS:
        text += f" Its last pod said: {of_pod.message}"
    return Failure("DeadlineExceeded", text, permanent=False)


def pod_failure(pod: Object) -> Failure | None:
    """Why a pod ended with an error; None if it did not."""
    status = pod.get("status") or {}
    if status.get("reason") == "Evicted":
        return Failure("Evicted", f"The pod was evicted: {status.get('message', '')}", permanent=False)
    message = _message(pod)
    if message.get("result") == "failed" and message.get("reason"):
        permanent = bool(message.get("permanent"))
        return Failure(str(message["reason"]), str(message.get("message", "")), permanent=permanent)
    terminated = _terminated(pod)
    code = terminated.get("exitCode", 0)
    if not terminated or code == 0:
        return None
    if terminated.get("reason") == "OOMKilled":
        return Failure(
            "OutOfMemory",
            "The container used more memory than its limit; raise spec.fetch.resources.limits.memory.",
            permanent=False,
        )
    last = str(terminated.get("message") or "").strip()[-500:]
    if (reason := _BY_EXIT_CODE.get(code)) is not None:
        info = REASONS[reason]
        return Failure(reason.value, last or f"{info.summary}; {info.remedy}", permanent=info.permanent)
    return Failure("ContainerFailed", f"The container ended with exit code {code}. {last}".strip(), permanent=False)


def obstacle(pod: Object, warnings: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    """(reason, message) of what keeps a pod from running; None if nothing does.

    Args:
        pod: The pod.
        warnings: Messages of Events by uid: only they tell of volumes, Secrets and ConfigMaps that cannot be mounted.
    """
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        kind = waiting.get("reason", "")
        if kind in _PULL_ERRORS:
            image = container.get("image", "")
            return "ImagePullError", f"The image {image} cannot be pulled; check the name and imagePullSecrets."
        if kind in _CONFIG_ERRORS:
            return kind, str(waiting.get("message", "the container cannot be created"))
        last = (container.get("lastState") or {}).get("terminated") or {}
        fails_again = container.get("restartCount", 0) > 1 and not container.get("ready") and last.get("exitCode")
        if kind == "CrashLoopBackOff" or fails_again:  # also while it runs for a moment, or the reason would flap
            return _crash(last)
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return "Unschedulable", f"No node takes the pod: {condition.get('message', '')}"
    if texts := warnings.get(pod["metadata"]["uid"]):
        return "MountFailed", f"A volume of the pod cannot be mounted: {texts[-1]}"
    return None


def refused(text: str) -> tuple[str, str]:
    """(reason, message) where the cluster makes no pod, by what its controller was told."""
    return "QuotaExceeded" if "exceeded quota" in text else "PodRefused", text


def not_ending(pod: Object, now: float) -> tuple[str, str] | None:
    """(reason, message) of a pod that should have ended long ago; no other begins while it may still write."""
    until = parse_time(pod["metadata"].get("deletionTimestamp"))
    if not until or now < until + TERMINATING_SECONDS:
        return None
    name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
    text = (
        f"Pod {name} was to end and does not: its node {node} is probably down. This goes on when the node is back; if "
        "it is off for good, delete the Node, or the pod with --force."
    )
    return "PodTerminating", text


def _crash(last: Mapping[str, Any]) -> tuple[str, str]:
    if last.get("reason") == "OOMKilled":
        mend = "raise spec.server.resources.limits.memory, or lower spec.server.cacheSize"
        return "OutOfMemory", f"The container uses more memory than its limit; {mend}."
    text = str(last.get("message") or "").strip()[-500:]
    return "CrashLoopBackOff", f"The container crashes: {text or 'see its logs'}"


def retry_at(attempt: Attempt, failed: Failure, observed: Observed, retry_seconds: float) -> float:
    """When a failed attempt is due again, in seconds since the epoch.

    Permanent failures wait the full time, others longer each time; a spec that was changed since is tried at once.
    """
    if _annotation(attempt.job, names.GENERATION_ANNOTATION) not in {"", str(observed.generation)}:
        return attempt.finished
    if failed.permanent:
        return attempt.finished + retry_seconds
    return attempt.finished + min(retry_seconds, TRANSIENT_BASE_SECONDS * float(2 ** min(attempt.number - 1, 10)))


def is_made_otherwise(job: Object, wanted: Object) -> bool:
    """Whether a Job's pods are not what they would be today; a Job's template cannot be changed."""
    return _annotation(job, names.TEMPLATE_ANNOTATION) not in {"", _annotation(wanted, names.TEMPLATE_ANNOTATION)}


def _annotation(job: Object, name: str) -> str:
    return str((job["metadata"].get("annotations") or {}).get(name, ""))


def _terminated(pod: Object) -> Mapping[str, Any]:
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        terminated: Mapping[str, Any] = (container.get("state") or {}).get("terminated") or {}
        if terminated:
            return terminated
    return {}


def _message(pod: Object) -> Mapping[str, Any]:
    """The termination message as JSON; {} if it is something else."""
    text = _terminated(pod).get("message") or ""
    try:
        decoded = json.loads(text)
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}
