"""Names, labels and owner references: the one place that builds them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelcache_api.resource import API_VERSION, KIND, ModelCacheSpec
from modelcache_api.source import parse_repo_id

Object = dict[str, Any]

NAME_LABEL = "modelcache.io/name"
COMPONENT_LABEL = "modelcache.io/component"
CLAIM_LABEL = "modelcache.io/claim"
KEY_LABEL = "modelcache.io/key"
ROUND_LABEL = "modelcache.io/round"
ATTEMPT_LABEL = "modelcache.io/attempt"
HOST_ANNOTATION = "modelcache.io/source-host"
RECONCILE_AT = "modelcache.io/reconcile-at"
APPLIED_ANNOTATION = "modelcache.io/applied"
TEMPLATE_ANNOTATION = "modelcache.io/template"
GENERATION_ANNOTATION = "modelcache.io/generation"
CACHE_SIZE_ANNOTATION = "modelcache.io/cache-size"
GROWN_AT_ANNOTATION = "modelcache.io/grown-at"

PLAN = "plan"
FETCH = "fetch"
SERVER = "server"
VOLUME = "volume"
KEYS = "keys"


def weights_name(name: str) -> str:
    """Deployment, Service and claim of a ModelCache."""
    return f"{name}-weights"


def headless_name(name: str) -> str:
    """The Service without an address of its own, whose name resolves to the pods."""
    return f"{name}-weights-pods"


def keys_name(name: str) -> str:
    """The ConfigMap with the cluster's public keys."""
    return f"{name}-weights-keys"


def claim_name(name: str, spec: ModelCacheSpec) -> str:
    """The claim that holds the snapshots."""
    return spec.storage.existing_claim or weights_name(name)


def claim_label(claim: str) -> str:
    """A claim's name as a label's value; long ones are shortened to a hash."""
    return claim if len(claim) <= 63 else f"{claim[:50].rstrip('-.')}-{_hash(claim)}"


def selector(name: str) -> dict[str, str]:
    """What finds the server's pods; never with a version in it, for selectors are immutable."""
    return {NAME_LABEL: name, COMPONENT_LABEL: SERVER}


def labels(name: str, component: str) -> dict[str, str]:
    """Labels of every child."""
    return {
        "app.kubernetes.io/name": "modelcache",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "modelcache-operator",
        NAME_LABEL: name,
        COMPONENT_LABEL: component,
    }


def owner_reference(name: str, uid: str) -> Object:
    """The reference by which the garbage collector deletes a child with its ModelCache."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def metadata(
    cr: Mapping[str, Any],
    child: str,
    component: str,
    *,
    owned: bool = True,
    annotations: Mapping[str, str] | None = None,
) -> Object:
    """Metadata of a child of the ModelCache ``cr``."""
    name = cr["metadata"]["name"]
    result: Object = {
        "name": child,
        "namespace": cr["metadata"]["namespace"],
        "labels": labels(name, component),
        "annotations": dict(annotations or {}),
    }
    if owned:
        result["ownerReferences"] = [owner_reference(name, cr["metadata"]["uid"])]
    return result


def plan_key(spec: ModelCacheSpec) -> str:
    """Hash of what a plan depends on: another one needs a new look at the source."""
    return _hash(
        parse_repo_id(spec.repo_id).canonical,
        spec.endpoint or "",
        spec.requested_revision,
        *_patterns(spec),
    )


def fetch_key(spec: ModelCacheSpec, commit: str) -> str:
    """Hash of what a snapshot depends on: another one needs a fetch."""
    return _hash(
        parse_repo_id(spec.repo_id).canonical,
        spec.endpoint or "",
        commit,
        # which names point at a commit is part of what is active
        spec.requested_revision,
        *_patterns(spec),
    )


def job_hash(*parts: str) -> str:
    """Part of a Job's name; the image is not in it, so that an upgrade fetches nothing again."""
    return _hash(*parts)


def content_hash(obj: Any) -> str:
    """Hash of a manifest as we wish it."""
    return _hash(json.dumps(obj, sort_keys=True))


def _patterns(spec: ModelCacheSpec) -> Sequence[str]:
    return ["allow", *sorted(set(spec.allow_patterns)), "ignore", *sorted(set(spec.ignore_patterns))]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]
