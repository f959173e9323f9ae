"""Reads one ModelCache and all around it, live: five calls when all is well, more only while something is in motion."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence

from modelcache_api.resource import ModelCacheSpec
from modelcache_operator import attempts
from modelcache_operator.asking import Pods
from modelcache_operator.clock import parse_time
from modelcache_operator.errors import ApiError, ApiUnreachable
from modelcache_operator.kube import (
    CLAIMS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    EVENTS,
    JOBS,
    PODS,
    SERVICES,
    Kube,
    Object,
    Resource,
)
from modelcache_operator.observed import Observed
from modelcache_operator.resources import names
from modelcache_operator.resources.server import TokenKeys
from modelcache_operator.running import PROGRESS_SECONDS

log = logging.getLogger(__name__)

KEYS_SECONDS = 60.0
"""How long the cluster's public keys are good for all ModelCaches: what is read with each resync is no older."""
STUCK_SECONDS = 3.0
"""A Job without a pod, a claim that is not bound, a pod that is not set up for longer: Events may say why."""
RECENT_SECONDS = 180.0
"""A kubelet repeats what keeps it from setting a pod up at least this often."""
_MOUNTING = {"FailedMount", "FailedAttachVolume", "FailedMapVolume"}

Key = tuple[str, str]


class Reader:
    """Makes an `Observed` out of live reads."""

    def __init__(self, kube: Kube, pods: Pods) -> None:
        self._kube = kube
        self._pods = pods
        self._asked: dict[Key, float] = {}
        self._keys: TokenKeys | None = None
        self._keys_read = float("-inf")

    def forget(self, key: Key) -> None:
        """The ModelCache is gone."""
        self._asked.pop(key, None)

    async def observe(self, cr: Object, spec: ModelCacheSpec) -> Observed:
        """Read what is around a ModelCache."""
        name, namespace = cr["metadata"]["name"], cr["metadata"]["namespace"]
        selector = f"{names.NAME_LABEL}={name}"
        weights = names.weights_name(name)
        jobs, claim, deployment, services = await asyncio.gather(
            self._kube.list(JOBS, namespace, labels=selector),
            self._get(CLAIMS, namespace, names.claim_name(name, spec)),
            self._get(DEPLOYMENTS, namespace, weights),
            self._services(namespace, name, wanted=spec.server.replicas > 0),
        )
        observed = Observed(
            cr=cr, spec=spec, now=time.time(), jobs=jobs, claim=claim, deployment=deployment, services=services
        )
        return await self._add_details(observed, selector)

    async def _add_details(self, observed: Observed, selector: str) -> Observed:
        namespace = observed.cr["metadata"]["namespace"]
        pods: Sequence[Object] = ()
        is_in_motion = _is_in_motion(observed)
        is_token = observed.spec.server.access.mode == "Token"
        has_key_set = is_token or _verifies_tokens(observed.deployment)
        if not is_in_motion and not has_key_set:
            return observed
        if is_in_motion:
            pods = await self._kube.list(PODS, namespace, labels=selector)
        keys = await self._token_keys() if is_token else None
        key_set = None
        if has_key_set:
            key_set = await self._get(CONFIG_MAPS, namespace, names.keys_name(observed.name))
        warnings = {}
        if is_in_motion:
            warnings = await self._warnings(observed, pods)
        key = (namespace, observed.name)
        progress = announced = None
        if pods and time.monotonic() - self._asked.get(key, float("-inf")) >= PROGRESS_SECONDS:
            progress = await self._pods.progress(pods)
            if progress is not None:
                self._asked[key] = time.monotonic()
        if pods and observed.condition("UpToDate").get("status") != "True":
            # who started after the fetch can announce nothing else
            fetched = observed.fetched_at
            older = [pod for pod in pods if parse_time(pod["metadata"].get("creationTimestamp")) < fetched]
            announced = await self._pods.announced(older)
        values = vars(observed) | {
            "pods": pods,
            "pods_were_read": is_in_motion,
            "keys": keys,
            "key_set": key_set,
            "warnings": warnings,
            "progress": progress,
            "announced": announced,
        }
        return Observed(**values)

    async def _get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        return await self._kube.get(resource, namespace, name)

    async def _services(self, namespace: str, name: str, *, wanted: bool) -> dict[str, Object]:
        """Ours by label; a name of ours that is missing is looked up, as a stranger has no such label."""
        found = await self._kube.list(SERVICES, namespace, labels=f"{names.NAME_LABEL}={name}")
        services = {service["metadata"]["name"]: service for service in found}
        for missing in {names.weights_name(name), names.headless_name(name)} - services.keys() if wanted else ():
            if (stranger := await self._get(SERVICES, namespace, missing)) is not None:
                services[missing] = stranger
        return services

    async def _warnings(self, observed: Observed, pods: Sequence[Object]) -> dict[str, list[str]]:
        """What only Events tell, of objects that are stuck."""
        stuck: list[Object] = []
        for job in observed.jobs:
            is_running = attempts.read(job).state == "running"
            if is_running and not attempts.pods_of(job, pods) and _age(job, observed.now) > STUCK_SECONDS:
                stuck.append(job)
        claim = observed.claim
        if claim is not None and (claim.get("status") or {}).get("phase") == "Pending":
            stuck.append(claim)
        stuck += [pod for pod in pods if _is_being_set_up(pod) and _age(pod, observed.now) > STUCK_SECONDS]
        warnings: dict[str, list[str]] = {}
        for obj in stuck:
            uid = obj["metadata"]["uid"]
            fields = f"involvedObject.uid={uid},type=Warning"
            events = await self._kube.list(EVENTS, obj["metadata"]["namespace"], fields=fields)
            if obj["kind"] == "Pod":  # what was in the way before is no news, and images are told of in its status
                events = [
                    e for e in events if e.get("reason") in _MOUNTING and observed.now - _seen(e) < RECENT_SECONDS
                ]
            events.sort(key=_seen)
            if texts := [str(event.get("message", "")) for event in events]:
                warnings[uid] = texts
        return warnings

    async def _token_keys(self) -> TokenKeys | None:
        """The cluster's issuer and public keys, read again after a minute; the last ones while that fails."""
        if time.monotonic() - self._keys_read < KEYS_SECONDS:
            return self._keys
        try:
            discovery = await self._kube.read_path("/.well-known/openid-configuration")
            key_set = await self._kube.read_path("/openid/v1/jwks")
        except (ApiError, ApiUnreachable) as error:
            log.warning("the cluster's public keys cannot be read: %s", error)
            return self._keys
        self._keys = TokenKeys(str(discovery["issuer"]), json.dumps(key_set, sort_keys=True))
        self._keys_read = time.monotonic()
        return self._keys


def _is_in_motion(observed: Observed) -> bool:
    """Whether pods can say something that is not known yet."""
    if observed.condition("UpToDate").get("status") != "True":
        return True
    if observed.spec.server.replicas and not ((observed.deployment or {}).get("status") or {}).get("availableReplicas"):
        return True
    planned = parse_time((observed.status.get("plan") or {}).get("time"))
    for job in observed.jobs:
        attempt = attempts.read(job)
        labels = job["metadata"].get("labels") or {}
        is_news = labels.get(names.COMPONENT_LABEL) == names.PLAN and attempt.finished > planned
        if attempt.state == "running" or is_news:
            return True
    return False


def _verifies_tokens(deployment: Object | None) -> bool:
    containers = ((deployment or {}).get("spec") or {}).get("template", {}).get("spec", {}).get("containers", [])
    return any("--token-key-set" in part for container in containers for part in container.get("command") or [])


def _is_being_set_up(pod: Object) -> bool:
    """Whether a node has taken the pod and none of its containers has run."""
    return (pod.get("status") or {}).get("phase") == "Pending" and bool(pod["spec"].get("nodeName"))


def _seen(event: Object) -> float:
    """When an Event was seen last."""
    series = event.get("series") or {}
    return parse_time(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime"))


def _age(obj: Object, now: float) -> float:
    return now - parse_time(obj["metadata"].get("creationTimestamp"))
