"""What somebody wants to see of a cluster when a test failed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cluster.kubectl import Kubectl, KubectlError


class HasKubectl(Protocol):
    """Any cluster."""

    @property
    def kubectl(self) -> Kubectl: ...


def write_diagnosis(cluster: HasKubectl, namespace: str | None, folder: Path) -> str:
    """Writes objects, events and container logs of the namespace (None: of all) into a folder; returns the events."""
    folder.mkdir(parents=True, exist_ok=True)
    where = [f"--namespace={namespace}"] if namespace else ["--all-namespaces"]
    events = printed(cluster.kubectl, "events", *where)
    kinds = "pods,jobs,deployments,services,persistentvolumeclaims,persistentvolumes,nodes"
    (folder / "events.txt").write_text(events)
    (folder / "objects.txt").write_text(printed(cluster.kubectl, "get", kinds, *where, "--output=wide"))
    (folder / "objects.yaml").write_text(printed(cluster.kubectl, "get", kinds, *where, "--output=yaml"))
    if namespace:
        kubectl = cluster.kubectl.within(namespace)
        for pod in printed(kubectl, "get", "pods", "--output=name").split():
            logs = printed(kubectl, "logs", pod, "--all-containers", "--prefix", "--tail=500")
            (folder / f"{pod.replace('/', '-')}.log").write_text(logs)
    return events


def printed(kubectl: Kubectl, *arguments: str) -> str:
    """What kubectl printed, or its complaint: a diagnosis goes on when a part of it fails."""
    try:
        return kubectl(*arguments, timeout=15)
    except KubectlError as error:
        return str(error)
