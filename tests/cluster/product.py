"""The product in the test cluster: installed by helm, a hub in a pod, ModelCaches and pods that read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.kubectl import Kubectl, Resource, condition
from cluster.node import wait_until
from cluster.programs import helm
from cluster.workloads import container, pod, pod_spec

TESTS = Path(__file__).parents[1]
CHART = TESTS.parent / "helm/modelcache"
SYSTEM = "modelcache-system"
MODELS = "modelcaches.modelcache.io"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
AUDIENCE = "modelcache.io"
HUB = "http://hub.hub.svc:8000"


def run_helm(kubectl: Kubectl, *arguments: str) -> str:
    """Run helm against the cluster; raises with what it said."""
    command = [str(helm()), "--kubeconfig", str(kubectl.kubeconfig), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(kubectl: Kubectl, image: str, *arguments: str) -> None:
    """helm upgrade --install, and wait until the operator is ready."""
    repository, _, tag = image.rpartition(":")
    run_helm(
        kubectl, "upgrade", "--install", "modelcache", str(CHART), f"--namespace={SYSTEM}", "--create-namespace",
        f"--set=image.repository={repository}", f"--set-string=image.tag={tag}", "--wait", "--timeout=120s",
        # what is tried again after five minutes, in some seconds; and many ModelCaches of one hub beside each other
        "--set-string=operator.env[0].name=MODELCACHE_RETRY_SECONDS,operator.env[0].value=15",
        "--set=operator.maxFetchesPerHost=20,operator.maxFetches=20", f"--set=defaults.endpoint={HUB}", *arguments,
    )  # fmt: skip


@contextmanager
def operator_down(kubectl: Kubectl) -> Iterator[None]:
    """No operator runs within; afterwards it is ready again."""
    within = kubectl.within(SYSTEM)
    within("scale", "deployment/modelcache", "--replicas=0")
    try:
        within(
            "wait",
            "--for=delete",
            "pod",
            "--selector=app.kubernetes.io/component=operator",
            "--timeout=60s",
            timeout=70,
        )
        yield
    finally:
        within("scale", "deployment/modelcache", "--replicas=1")
        within("rollout", "status", "deployment/modelcache", "--timeout=60s", timeout=70)


def children(namespace: Kubectl, name: str) -> list[str]:
    """Everything that a ModelCache of that name has in the namespace."""
    kinds = "deployments,services,jobs,pods,persistentvolumeclaims,configmaps"
    return [f"{o['kind']}/{o['metadata']['name']}" for o in namespace.list(kinds, f"modelcache.io/name={name}")]


class Hub:
    """The fake hub as a pod with a Service, in a namespace of its own."""

    def __init__(self, kubectl: Kubectl, image: str) -> None:
        self.kubectl = kubectl
        self.url = HUB
        files = {
            "fake_hub.py": TESTS / "support/fake_hub.py",
            "sendfile_server.py": TESTS / "support/sendfile_server.py",
            "hub_pod.py": Path(__file__).with_name("hub_pod.py"),
        }
        code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"}, "data": {}}
        code["data"] = {name: path.read_text() for name, path in files.items()}
        main = container(image, "python3", "/app/hub_pod.py", env=[{"name": "HOST", "value": urlsplit(HUB).hostname}])
        spec = pod_spec(main)
        items = [{"key": n, "path": n if n == "hub_pod.py" else f"support/{n}"} for n in files]
        spec["volumes"] = [
            {"name": "app", "configMap": {"name": "hub", "items": items}},
            {"name": "tmp", "emptyDir": {}},
        ]
        main["volumeMounts"] = [{"name": "app", "mountPath": "/app"}, {"name": "tmp", "mountPath": "/tmp"}]
        spec["containers"] = [main]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "hub"},
            "spec": {
                "selector": {"app": "hub"},
                "ports": [{"name": "api", "port": 8000}, {"name": "files", "port": 8001}],
            },
        }
        kubectl.apply(code, service, pod("hub", spec))
        kubectl.wait_for("pod", "hub", lambda p: p["status"].get("phase") == "Running", seconds=120)
        wait_until("the hub in the pod", 60, self._try, pause=0.5)

    def _try(self) -> bool:
        try:
            self.order(count="/")
        except Exception:  # noqa: BLE001 - not there yet
            return False
        return True

    def order(self, **order: Any) -> dict[str, Any]:
        """Send one command to the hub's control port."""
        script = (
            "import sys,urllib.request as u;"
            "print(u.urlopen(u.Request('http://127.0.0.1:8002', data=sys.argv[1].encode())).read().decode())"
        )
        answer: dict[str, Any] = json.loads(
            self.kubectl("exec", "hub", "--", "python3", "-c", script, json.dumps(order))
        )
        return answer

    def commit(self, seed: int, **more: Any) -> dict[str, Any]:
        """A new state of org/model; answers its commit and the weights' sha256."""
        return self.order(commit={"repo": "org/model", "seed": seed, **more})

    def commit_folder(self, repo: str, folder: Path) -> str:
        """A repo with the files of a folder of this machine; returns the commit."""
        unpack = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/tmp/repo')"
        packed = subprocess.run(["tar", "-C", str(folder), "-c", "."], check=True, capture_output=True).stdout
        command = self.kubectl.argv("exec", "--stdin", "hub", "--", "python3", "-c", unpack)
        subprocess.run(command, input=packed, check=True, timeout=120)
        return str(self.order(folder={"repo": repo, "path": "/tmp/repo"})["commit"])

    def slow(self, repo: str, bytes_per_second: float) -> None:
        """Files of a repo come no faster than this, until `mend`."""
        self.order(fault={"match": f"/files/{repo}/*", "times": -1, "bytes_per_second": bytes_per_second})

    def mend(self) -> None:
        """End all faults."""
        self.order(clear=True)

    def count(self, match: str = "/files/*") -> int:
        """How many GETs of matching paths there were; by default of files' bytes."""
        return int(self.order(count=match)["count"])


class Model:
    """A ModelCache in a namespace."""

    def __init__(self, kubectl: Kubectl, hub: Hub, name: str = "bert", **spec: Any) -> None:
        self.kubectl = kubectl
        self.name = name
        self.spec = {"repoId": "org/model", "endpoint": hub.url} | spec
        self.apply()

    def apply(self, **changes: Any) -> None:
        """kubectl apply, with fields changed."""
        self.spec |= changes
        body = {"apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "metadata": {"name": self.name}}
        self.kubectl.apply({**body, "spec": {k: v for k, v in self.spec.items() if v is not None}})

    def wait(self, type_: str = "UpToDate", seconds: int = 180) -> Resource:
        """`kubectl wait`, as a user does it."""
        self.kubectl(
            "wait",
            f"--for=condition={type_}",
            f"{MODELS}/{self.name}",
            f"--timeout={seconds}s",
            timeout=seconds + 10,
        )
        return self.get()

    def condition(self, type_: str) -> Resource:
        """A condition as it is now."""
        return condition(self.get(), type_)

    def get(self) -> Resource:
        """The object."""
        found = self.kubectl.get(MODELS, self.name)
        assert found is not None
        return found

    def wait_for_reason(self, type_: str, reason: str, seconds: float = 120) -> Resource:
        """Wait until a condition of the present generation has this reason."""

        def holds(cr: Resource) -> bool:
            return any(
                c["type"] == type_
                and c["reason"] == reason
                and c.get("observedGeneration") == cr["metadata"]["generation"]
                for c in cr.get("status", {}).get("conditions", [])
            )

        return self.kubectl.wait_for(MODELS, self.name, holds, seconds=seconds)


def reader(image: str, name: str, script: str, *arguments: str, **env: str) -> Resource:
    """A pod that runs a Python script of the client's side and may write in /tmp."""
    variables = [{"name": key, "value": value} for key, value in env.items()]
    spec = pod_spec(container(image, "python3", "-c", script, *arguments, env=variables))
    spec["volumes"] = [{"name": "tmp", "emptyDir": {}}]
    spec["containers"][0]["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    return pod(name, spec)


def as_account(made: Resource, account: str) -> Resource:
    """A pod of `reader` as one of a ServiceAccount, with its token for weight servers in /var/run/modelcache/token."""
    spec = made["spec"]
    projected = {"serviceAccountToken": {"path": "token", "audience": AUDIENCE, "expirationSeconds": 600}}
    spec["serviceAccountName"] = account
    spec["volumes"].append({"name": "token", "projected": {"sources": [projected]}})
    spec["containers"][0]["volumeMounts"].append({"name": "token", "mountPath": "/var/run/modelcache"})
    return made


def with_volume(made: Resource, name: str) -> Resource:
    """A pod of `reader` with the volume of a ModelCache at /volume, read-only."""
    spec = made["spec"]
    claim = {"claimName": f"{name}-weights", "readOnly": True}
    spec["volumes"].append({"name": "volume", "persistentVolumeClaim": claim})
    spec["containers"][0]["volumeMounts"].append({"name": "volume", "mountPath": "/volume", "readOnly": True})
    return made


def printed_by(namespace: Kubectl, made: Resource, seconds: float = 120) -> str:
    """Run a pod of `reader` to its end and return what it printed; it must succeed."""
    return printed_by_all(namespace, made, seconds=seconds)[0]


def printed_by_all(namespace: Kubectl, *made: Resource, seconds: float = 120) -> list[str]:
    """As `printed_by`, pods beside each other."""
    for one in made:
        namespace.delete("pod", one["metadata"]["name"])
    namespace.apply(*made)
    return [log_of_ended(namespace, one["metadata"]["name"], seconds) for one in made]


def log_of_ended(namespace: Kubectl, name: str, seconds: float = 120) -> str:
    """What a pod printed, once it has ended; it must succeed."""
    ended = namespace.wait_for("pod", name, lambda p: p["status"]["phase"] in {"Succeeded", "Failed"}, seconds=seconds)
    printed = namespace("logs", name)
    assert ended["status"]["phase"] == "Succeeded", printed
    return printed
