"""What the operator's account has to be allowed, and what it must not be: the chart's RBAC is tested against this."""

from dataclasses import dataclass
from typing import Protocol

from modelcache_operator.resources.names import Object
from modelcache_operator.settings import Settings


class Reviewer(Protocol):
    """The call of `kube.Kube` that is needed here."""

    async def review(self, attributes: Object) -> bool:
        """Whether this account may do something."""


@dataclass(frozen=True)
class Right:
    """One verb on one resource."""

    group: str
    resource: str
    verb: str
    subresource: str = ""

    def __str__(self) -> str:
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {what}" + (f" in {self.group}" if self.group else "")


def _rights(group: str, resource: str, verbs: str, subresource: str = "") -> list[Right]:
    return [Right(group, resource, verb, subresource) for verb in verbs.split()]


NEEDED: tuple[Right, ...] = (
    *_rights("modelcache.io", "modelcaches", "get list watch"),
    *_rights("modelcache.io", "modelcaches", "patch", "status"),
    *_rights("batch", "jobs", "list watch create delete"),
    *_rights("apps", "deployments", "get list watch create patch delete"),
    *_rights("", "services", "get list watch create patch delete"),
    *_rights("", "configmaps", "get list watch create patch delete"),
    *_rights("", "persistentvolumeclaims", "get list watch create patch"),
    *_rights("", "pods", "list watch"),
    *_rights("", "events", "list create"),
)

LEASE: tuple[Right, ...] = (*_rights("coordination.k8s.io", "leases", "create get update"),)
"""In the operator's own namespace, for its own Lease."""

FORBIDDEN: tuple[Right, ...] = (
    *_rights("", "secrets", "get list watch create update patch delete"),
    *_rights("", "pods", "get", "log"),
    *_rights("", "pods", "create", "exec"),
    *_rights("", "pods", "create delete"),
    *_rights("", "persistentvolumeclaims", "delete"),
    *_rights("modelcache.io", "modelcaches", "create update patch delete"),
)


async def problems(reviewer: Reviewer, settings: Settings) -> list[str]:
    """Sentences about rights that are missing or too much."""
    found: list[str] = []
    for namespace in settings.namespaces or ("",):
        where = f" in namespace {namespace}" if namespace else ""
        for right in (*NEEDED, *FORBIDDEN):
            is_allowed = await _is_allowed(reviewer, right, namespace)
            if not is_allowed and right in NEEDED:
                found.append(f"not allowed, but needed: {right}{where}")
            elif is_allowed and right in FORBIDDEN:
                found.append(f"allowed, but must not be: {right}{where}")
    lease, namespace = settings.lease_name, settings.operator_namespace
    found += [
        f"not allowed, but needed: {right} for {lease} in namespace {namespace}"
        for right in (LEASE if lease else ())
        if not await _is_allowed(reviewer, right, namespace, "" if right.verb == "create" else lease)
    ]
    return found


async def _is_allowed(reviewer: Reviewer, right: Right, namespace: str, name: str = "") -> bool:
    return await reviewer.review(
        {
            "namespace": namespace,
            "group": right.group,
            "resource": right.resource,
            "subresource": right.subresource,
            "verb": right.verb,
            "name": name,
        }
    )
