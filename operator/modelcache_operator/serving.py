"""Fourth stage: the weight servers and their Services."""

from dataclasses import dataclass, field
from typing import Any

from modelcache_operator import attempts
from modelcache_operator.actions import Actions, is_changed, marked_object
from modelcache_operator.comparison import covers
from modelcache_operator.conditions import SERVING, UP_TO_DATE, Condition
from modelcache_operator.fetching import Active
from modelcache_operator.observed import Observed, conflict_text
from modelcache_operator.resources import claim as claims
from modelcache_operator.resources import names, server
from modelcache_operator.resources.names import Object
from modelcache_operator.settings import Settings
from modelcache_operator.storing import Stored

ROLLOUT_WAIT_SECONDS = 300.0
"""As for `running.SLOT_WAIT_SECONDS`; as long as a rollout that hangs holds up the others."""
_NO_KEYS = (
    "KeySetUnavailable",
    "The cluster's public keys (/openid/v1/jwks) cannot be read; servers that verify tokens need them.",
)


@dataclass(frozen=True)
class Served:
    """The servers as they are.

    Attributes:
        condition: Serving.
        endpoint: status.endpoint.
        server: status.server.
        is_wanted: Whether there are to be servers at all.
        behind: (reason, message) while the servers are not those that the spec asks for now.
    """

    condition: Condition
    endpoint: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    is_wanted: bool = True
    behind: tuple[str, str] | None = None


def serve(observed: Observed, settings: Settings, actions: Actions, stored: Stored, active: Active | None) -> Served:
    """Bring servers and Services to what they should be.

    Args:
        observed: What was read.
        settings: The operator's.
        actions: Takes what is to be done.
        stored: The volume.
        active: What is active on it; None: nothing, then no server starts.
    """
    selector = ",".join(f"{key}={value}" for key, value in sorted(names.selector(observed.name).items()))
    if observed.spec.server.replicas == 0:
        _remove_all(observed, actions)
        text = "spec.server.replicas is 0: pods mount the volume."
        state = {"replicas": 0, "readyReplicas": 0, "selector": selector}
        return Served(Condition(SERVING, "False", "MountOnly", text), {}, state, is_wanted=False)
    status = (observed.deployment or {}).get("status") or {}
    counts = {
        "replicas": int(status.get("replicas") or 0),
        "readyReplicas": int(status.get("readyReplicas") or 0),
        "selector": selector,
    }
    if (conflict := _conflict(observed, actions)) is not None:
        return Served(conflict, {}, counts)
    for wanted in server.services(observed.cr, observed.spec):
        actions.ensure(wanted, observed.services.get(wanted["metadata"]["name"]))
    waiting = _deploy(observed, settings, actions, stored, active)
    condition = _condition(observed, actions, active)
    rolling = _rolling(observed, actions)
    endpoint = _endpoint(observed, is_rolling=rolling is not None)
    return Served(condition, endpoint, counts, behind=_refused(observed) or waiting or rolling)


def _rolling(observed: Observed, actions: Actions) -> tuple[str, str] | None:
    """Why servers of before still run: the new ones are not ready yet, or something keeps them from it."""
    live = observed.deployment
    if live is None:
        return None
    status = live.get("status") or {}
    is_changed_now = any(wanted["kind"] == "Deployment" and _restarts(live, wanted) for wanted in actions.applies)
    # what the controller has not seen yet are other pods, or only more or fewer of them if all was well with this spec
    before = observed.condition(UP_TO_DATE)
    was_well = before.get("status") == "True" and before.get("observedGeneration") == observed.generation
    is_seen = was_well or status.get("observedGeneration", 0) >= live["metadata"].get("generation", 0)
    if not is_changed_now and is_seen and status.get("replicas", 0) <= status.get("updatedReplicas", 0):
        return None
    if (obstacle := _obstacle(observed)) is not None:
        return obstacle
    actions.look_again(30)
    return "RollingOut", "Servers made as the spec asks for now take over, one after the other."


def _refused(observed: Observed) -> tuple[str, str] | None:
    """What of the servers the API server would not take."""
    kinds = {"Deployment", "Service", "ConfigMap"}
    refusal = next((found for (kind, _), found in observed.refusals.items() if kind in kinds), None)
    return (refusal.reason, refusal.message) if refusal is not None else None


def _obstacle(observed: Observed) -> tuple[str, str] | None:
    """(reason, message) of what keeps servers from coming up; None if nothing does."""
    for pod in _server_pods(observed):
        if (found := attempts.obstacle(pod, observed.warnings)) is not None:
            return found
    for condition in ((observed.deployment or {}).get("status") or {}).get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return attempts.refused(str(condition.get("message", "")))
    return None


def _conflict(observed: Observed, actions: Actions) -> Condition | None:
    """A child that exists and is not ours; nothing of the servers is touched then."""
    found = [observed.deployment, *observed.services.values(), observed.key_set]
    for child in found:
        if child is None or observed.is_ours(child):
            continue
        what = f"{child['kind']} {child['metadata']['name']}"
        actions.look_again(2 if observed.leftover(child) else 60)
        if observed.leftover(child):
            return Condition(SERVING, "False", "Terminating", f"{what} of an earlier ModelCache is still going.")
        return Condition(SERVING, "False", "NameConflict", conflict_text(what))
    return None


def _deploy(
    observed: Observed, settings: Settings, actions: Actions, stored: Stored, active: Active | None
) -> tuple[str, str] | None:
    """Apply Deployment and key set where that is called for; (reason, message) of what they wait for otherwise."""
    live = observed.deployment
    spec = observed.spec
    if stored.claim is None or active is None:
        replicas = 0
        if live is None:
            return None
    else:
        replicas = spec.server.replicas
    keys = observed.keys if spec.server.access.mode == "Token" else None
    if spec.server.access.mode == "Token":
        if keys is None:
            actions.look_again(10)
            return _NO_KEYS
        actions.ensure(server.key_set(observed.cr, keys), observed.key_set)
    planned = active.bytes if active is not None else 0
    wanted = server.deployment(
        observed.cr,
        spec,
        settings,
        claim=stored.name,
        many_nodes=claims.many_nodes(spec, observed.claim),
        cache=server.cache_bytes(spec, planned, live),
        replicas=replicas,
        keys=keys,
    )
    waiting = _roll(observed, actions, wanted, live)
    if keys is None and waiting is None:  # servers of before want it at each start
        actions.remove(observed.key_set)
    return waiting


def _roll(observed: Observed, actions: Actions, wanted: Object, live: Object | None) -> tuple[str, str] | None:
    """Apply the Deployment; a change that restarts pods waits for its turn: an upgrade moves a few at a time."""
    if live is None:
        actions.ensure(wanted, live)
        return None
    if not is_changed(live, marked_object(wanted)):
        return None
    going_down = wanted["spec"]["replicas"] == 0
    if not _restarts(live, wanted) or going_down or observed.slots.get("rollout"):
        actions.ensure(wanted, live)
        return None
    if "rollout" not in observed.slots:
        actions.asks.add("rollout")
    else:
        actions.look_again(ROLLOUT_WAIT_SECONDS)
    text = "As many servers are replaced as the operator allows (maxRollouts); this change waits for its turn."
    return "WaitingForTurn", text


def _restarts(live: Object, wanted: Object) -> bool:
    """Whether applying replaces the pods."""
    annotation = names.TEMPLATE_ANNOTATION
    before = (live["metadata"].get("annotations") or {}).get(annotation)
    is_same = before == wanted["metadata"]["annotations"][annotation]
    return not is_same or not covers(live["spec"]["template"], wanted["spec"]["template"])


def _condition(observed: Observed, actions: Actions, active: Active | None) -> Condition:
    live = observed.deployment
    if active is None:
        return Condition(SERVING, "False", "WaitingForFetch", "Servers start when a snapshot is on the volume.")
    is_found = all(kind != "Service" or name in observed.services for kind, name in observed.refusals)
    available = int(((live or {}).get("status") or {}).get("availableReplicas") or 0)
    if available and is_found:
        wanted = observed.spec.server.replicas
        text = f"{available} of {wanted} servers are ready."
        if (refusal := observed.refusals.get(("Deployment", names.weights_name(observed.name)))) is not None:
            text += f" The last change was refused: {refusal.message}"
        return Condition(SERVING, "True", "Serving", text)
    has_no_keys = observed.spec.server.access.mode == "Token" and observed.keys is None
    trouble = _refused(observed) or (_NO_KEYS if has_no_keys else _obstacle(observed))
    if trouble is not None:
        return Condition(SERVING, "False", *trouble)
    actions.look_again(30)
    return Condition(SERVING, "False", "Starting", "The servers are starting and filling their caches.")


def _server_pods(observed: Observed) -> list[Object]:
    return [
        pod
        for pod in observed.pods
        if (pod["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL) == names.SERVER
        and not pod["metadata"].get("deletionTimestamp")
        and (pod.get("status") or {}).get("phase") not in {"Succeeded", "Failed"}
    ]


def _endpoint(observed: Observed, *, is_rolling: bool) -> dict[str, Any]:
    """Where clients connect now: what was true before holds until no server of before is left."""
    known = observed.status.get("endpoint")
    if is_rolling and known:
        return dict(known)
    live = observed.deployment
    is_tls = server.speaks_tls(live) if live is not None else observed.spec.server.access.tls is not None
    host = f"{names.weights_name(observed.name)}.{observed.cr['metadata']['namespace']}.svc"
    scheme = "https" if is_tls else "http"
    return {"grpc": f"dns:///{host}:{server.GRPC_PORT}", "http": f"{scheme}://{host}:{server.HTTP_PORT}"}


def _remove_all(observed: Observed, actions: Actions) -> None:
    """Without servers their objects go; claims and snapshots stay."""
    for child in (observed.deployment, *observed.services.values(), observed.key_set):
        if child is not None and observed.owns(child):
            actions.remove(child)
