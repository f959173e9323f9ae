"""What all pods of a ModelCache have in common: restricted Pod Security, no API token, placement by the volume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcache_api.kubernetes import Part
from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.resources.names import CLAIM_LABEL, Object, claim_label
from modelcache_operator.settings import Settings

VOLUME_PATH = "/volume"
SECRETS_PATH = "/etc/modelcache/secrets"
CA_PATH = "/etc/modelcache/ca"


@dataclass(frozen=True)
class Placement:
    """Where pods run, in a pod's own words."""

    node_selector: Mapping[str, str]
    tolerations: Sequence[Object]
    affinity: Object | None
    topology_spread_constraints: Sequence[Object] = ()


def dump(part: Part) -> Object:
    """A part of the spec as Kubernetes spells it, without what is absent."""
    return part.model_dump(by_alias=True, exclude_none=True)


def resources_of(part: Part) -> Object:
    """Resources without empty maps."""
    return {key: value for key, value in dump(part).items() if value}


def server_placement(spec: ModelCacheSpec, claim: str, pods: Mapping[str, str], *, many_nodes: bool) -> Placement:
    """Where servers run: on the volume's one node, or spread over nodes."""
    server = spec.server
    tolerations = [dump(toleration) for toleration in server.tolerations]
    if not many_nodes:
        return Placement(server.node_selector, tolerations, _beside_claim(server.affinity, claim))
    spread: list[Object] = list(server.topology_spread_constraints) or [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": dict(pods)},
        }
    ]
    return Placement(server.node_selector, tolerations, server.affinity, spread)


def fetch_placement(spec: ModelCacheSpec, claim: str, *, many_nodes: bool) -> Placement:
    """Where fetches run: with a volume of one node as the servers do and on their node; else as spec.fetch says."""
    if many_nodes:
        fetch = spec.fetch
        return Placement(fetch.node_selector, [dump(toleration) for toleration in fetch.tolerations], fetch.affinity)
    tolerations = [dump(toleration) for toleration in spec.server.tolerations]
    return Placement(spec.server.node_selector, tolerations, _beside_claim(spec.server.affinity, claim))


def _beside_claim(affinity: Object | None, claim: str) -> Object:
    """Affinity that draws all pods with this claim to one node.

    A pod that matches its own required affinity may go anywhere while no other one matches
    (https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/), so the first one chooses.
    """
    term = {
        "labelSelector": {"matchLabels": {CLAIM_LABEL: claim_label(claim)}},
        "topologyKey": "kubernetes.io/hostname",
    }
    merged: Object = dict(affinity or {})
    pod_affinity = dict(merged.get("podAffinity") or {})
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    pod_affinity[required] = [*(pod_affinity.get(required) or []), term]
    merged["podAffinity"] = pod_affinity
    return merged


def container(settings: Settings, name: str, command: Sequence[str], **more: Any) -> Object:
    """A container that may do nothing but its work."""
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(command),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **more,
    }


def pod_spec(
    spec: ModelCacheSpec,
    settings: Settings,
    containers: list[Object],
    volumes: list[Object],
    placement: Placement | None,
    **more: Any,
) -> Object:
    """A pod under restricted Pod Security, without an API token."""
    security: Object = {
        "runAsNonRoot": True,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if settings.defaults.run_as_user is not None:
        security["runAsUser"] = security["runAsGroup"] = settings.defaults.run_as_user
    if settings.defaults.fs_group is not None:
        security["fsGroup"] = settings.defaults.fs_group
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security,
        "containers": containers,
        "volumes": volumes,
        **more,
    }
    if spec.fetch.image_pull_secrets:
        pod["imagePullSecrets"] = [dump(reference) for reference in spec.fetch.image_pull_secrets]
    if placement is not None:
        if placement.node_selector:
            pod["nodeSelector"] = dict(placement.node_selector)
        if placement.tolerations:
            pod["tolerations"] = list(placement.tolerations)
        if placement.affinity:
            pod["affinity"] = placement.affinity
        if placement.topology_spread_constraints:
            pod["topologySpreadConstraints"] = list(placement.topology_spread_constraints)
    return pod


def scratch() -> tuple[Object, Object]:
    """Volume and mount of /tmp, as the root file system is read-only."""
    return {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}, {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108
