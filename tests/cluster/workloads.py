"""Plain builders of the objects that tests apply: as restricted as the product's own pods are."""

from __future__ import annotations

from typing import Any

from cluster.kubectl import Resource

USER = 65532


def container(image: str, *command: str, **more: Any) -> Resource:
    """A container that may write nothing but its volumes."""
    return {
        "name": "main",
        "image": image,
        "command": list(command),
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **more,
    }


def pod_spec(main: Resource, *, claim: str = "", fs_group: int | None = USER, **more: Any) -> Resource:
    """A pod of one container, as user 65532, with the claim's volume at /volume."""
    security: Resource = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if fs_group is not None:
        security |= {"fsGroup": fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    volumes = [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}] if claim else []
    mounts = [{"name": "volume", "mountPath": "/volume"}] if claim else []
    return {
        "securityContext": security,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [{**main, "volumeMounts": mounts}],
        "volumes": volumes,
        **more,
    }


def pod(name: str, spec: Resource) -> Resource:
    """A pod that is not started again when it ends."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", **spec},
    }


def job(name: str, spec: Resource) -> Resource:
    """A Job of one attempt."""
    template = {"spec": {"restartPolicy": "Never", **spec}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template},
    }


def deployment(name: str, spec: Resource, *, replicas: int = 1) -> Resource:
    """A Deployment whose pods have the label app=NAME."""
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def service(name: str, port: int) -> Resource:
    """A Service for the pods with the label app=NAME."""
    spec = {"selector": {"app": name}, "ports": [{"port": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def claim(name: str, size: str, *, storage_class: str | None = None, mode: str = "ReadWriteOnce") -> Resource:
    """A PersistentVolumeClaim, of the default class unless one is named."""
    spec: Resource = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
