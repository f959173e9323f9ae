"""A second Node object without a kubelet shows where the scheduler puts pods: they are bound to it, and never run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from cluster.kubectl import Kubectl, Resource, has_condition

NAME = "node-1"
HEARTBEAT_SECONDS = 10.0  # the node lifecycle controller gives up on a node after 50


@contextmanager
def second_node(kubectl: Kubectl) -> Iterator[str]:
    """The node's name; within, it is Ready and free of taints. Pods that were put on it are gone afterwards."""
    stop = threading.Event()
    kubectl.apply(node())
    kubectl.patch("node", NAME, node_status(), subresource="status")
    heart = threading.Thread(target=beat, args=(kubectl, stop), daemon=True)
    heart.start()
    try:
        kubectl.wait_for("node", NAME, lambda found: has_condition("Ready")(found) and not found["spec"].get("taints"))
        yield NAME
    finally:
        stop.set()
        heart.join()
        kubectl(
            "delete",
            "pods",
            "--all-namespaces",
            f"--field-selector=spec.nodeName={NAME}",
            "--force",
            "--grace-period=0",
        )
        kubectl.delete("node", NAME)


def beat(kubectl: Kubectl, stop: threading.Event) -> None:
    """Renews the node's Lease, as a kubelet does."""
    while not stop.is_set():
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kubectl.within("kube-node-lease").apply(
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": NAME},
                "spec": {"holderIdentity": NAME, "leaseDurationSeconds": 40, "renewTime": now},
            }
        )
        stop.wait(HEARTBEAT_SECONDS)


def node() -> Resource:
    labels = {"kubernetes.io/hostname": NAME, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME, "labels": labels}}


def node_status() -> Resource:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    room = {"cpu": "8", "memory": "16Gi", "pods": "110", "ephemeral-storage": "100Gi"}
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "message": "no kubelet: pods are only bound here",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    return {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
