"""The examples as a user applies them: all are taken by the API server, those of the hub and of S3 run.

What a test changes in one for this cluster is said there. The hub is a mirror that the chart makes the default
of all ModelCaches, so that the examples' own sources need no change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from cluster.kubectl import Kubectl, Resource
from cluster.machine import MachineCluster
from cluster.node import wait_until
from cluster.product import MODELS, Hub

EXAMPLES = Path(__file__).parents[2] / "examples/kubernetes"
BERT = "google-bert/bert-base-uncased"
S3_PORT = 5000
KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "aws_region": "us-east-1"}


@pytest.fixture(scope="module")
def images(installed: str, client_image: str) -> dict[str, str]:
    """The product, with the hub as everybody's mirror; the images that stand for the examples' names."""
    return {"modelcache": installed, "modelcache-client": client_image}


@pytest.fixture
def restricted(namespace: Kubectl, kubectl: Kubectl) -> Kubectl:
    """A namespace that takes only pods of the restricted Pod Security standard."""
    return with_label(namespace, kubectl)


@pytest.fixture(scope="module")
def dry(kubectl: Kubectl) -> Iterator[Kubectl]:
    """The same for all tests that leave nothing in it."""
    within = kubectl.new_namespace("dry")
    yield with_label(within, kubectl)
    kubectl.delete("namespace", str(within.namespace), wait=False)


def with_label(within: Kubectl, kubectl: Kubectl) -> Kubectl:
    kubectl("label", "namespace", str(within.namespace), "pod-security.kubernetes.io/enforce=restricted")
    return within


def example(name: str, images: dict[str, str] | None = None) -> Resource:
    """One example, with this cluster's names of images."""
    found: Resource = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    if found["kind"] != "ModelCache" and images is not None:
        spec = found["spec"]["template"]["spec"] if found["kind"] == "Deployment" else found["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            container["image"] = images[container["image"].partition(":")[0]]
    return found


def wait_up_to_date(namespace: Kubectl, name: str) -> Resource:
    namespace("wait", "--for=condition=UpToDate", f"mc/{name}", "--timeout=180s", timeout=190)
    found = namespace.get(MODELS, name)
    assert found is not None
    return found


def ended(namespace: Kubectl, pod: str) -> str:
    """The log of a pod that has succeeded."""
    done = namespace.wait_for("pod", pod, lambda p: p["status"]["phase"] in {"Succeeded", "Failed"}, seconds=180)
    log = namespace("logs", pod)
    assert done["status"]["phase"] == "Succeeded", log
    return log


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_api_server_takes_the_example(path: Path, images: dict[str, str], dry: Kubectl) -> None:
    done = subprocess.run(
        dry.argv("apply", "--dry-run=server", "--validate=strict", f"--filename={path}"),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, "and has nothing to say against it, not even about Pod Security"


def test_minimal_and_the_ways_to_use_it(images: dict[str, str], hub: Hub, restricted: Kubectl) -> None:
    made = hub.order(commit={"repo": BERT, "seed": 1, "bert": True})
    restricted.apply(example("deployment-waits", images))
    restricted("apply", f"--filename={EXAMPLES}/minimal.yaml")
    cr = wait_up_to_date(restricted, "bert-base")
    assert cr["status"]["revision"]["active"] == made["commit"]
    pods = ("pod-streams-bert", "pod-hf-hub-cache", "pod-hf-endpoint")
    restricted.apply(*(example(pod, images) for pod in pods))
    assert "torch.Size([1, 4, 32])" in ended(restricted, "streams-bert")
    for pod in ("unchanged-program", "unchanged-program-http"):
        assert ended(restricted, pod).split()[-1] == "293408"
    restricted("rollout", "status", "deployment/embedder", "--timeout=120s", timeout=130)
    assert "71 tensors are loaded" in restricted("logs", "deployment/embedder", "--container=main")


@pytest.mark.slow
def test_a_gated_repo_with_its_secret(images: dict[str, str], hub: Hub, restricted: Kubectl) -> None:
    manifest = example("gated-repo")
    hub.order(commit={"repo": manifest["spec"]["repoId"], "seed": 2, "bert": True, "token": "hf_right"})
    del manifest["spec"]["server"]  # 4 GiB of cache are more than a test should take
    restricted("create", "secret", "generic", "hf-token", "--from-literal=hf_access_token=hf_right")
    restricted.apply(manifest)
    wait_up_to_date(restricted, "llama")


@pytest.mark.slow
def test_a_branch_is_followed_and_rolled_back(images: dict[str, str], hub: Hub, restricted: Kubectl) -> None:
    manifest = example("follow-branch")
    repo = manifest["spec"]["repoId"]
    first = hub.order(commit={"repo": repo, "seed": 3, "bert": True})["commit"]
    restricted.apply(manifest)
    assert wait_up_to_date(restricted, "minilm")["status"]["revision"]["active"] == first
    second = hub.order(commit={"repo": repo, "seed": 4, "bert": True})["commit"]
    # the interval of ten minutes is not waited for
    restricted("annotate", "--overwrite", "mc/minilm", "modelcache.io/reconcile-at=now")
    restricted.wait_for(MODELS, "minilm", lambda cr: cr["status"]["revision"].get("active") == second, seconds=120)
    cr = wait_up_to_date(restricted, "minilm")
    assert [kept["commit"] for kept in cr["status"]["revision"]["previous"]] == [first]
    restricted.wait_for("deployment", "minilm-weights", lambda d: d["status"].get("readyReplicas") == 2, seconds=120)
    before = hub.count()
    manifest["spec"]["revision"] = first
    restricted.apply(manifest)
    assert wait_up_to_date(restricted, "minilm")["status"]["revision"]["active"] == first
    assert hub.count() == before


@pytest.fixture
def s3(machine_cluster: MachineCluster, tmp_path: Path) -> Iterator[str]:
    """moto's S3 on the node's address, where pods reach it; the URL."""
    address = machine_cluster.node.addresses.node
    command = machine_cluster.in_network([sys.executable, "-m", "moto.server", f"-H{address}", f"-p{S3_PORT}"])
    with (tmp_path / "moto.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}:{S3_PORT}"
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_prefix_of_an_s3_bucket(images: dict[str, str], s3: str, restricted: Kubectl, tmp_path: Path) -> None:
    from cluster.hub_pod import BERT as CONFIG
    from cluster.hub_pod import bert_weights

    client: Any = boto3.client(
        "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    wait_until("moto", 60, lambda: answers(client), pause=0.3)
    client.create_bucket(Bucket="models")
    client.put_object(Bucket="models", Key="ranker/v3/model.safetensors", Body=bert_weights(5))
    client.put_object(Bucket="models", Key="ranker/v3/config.json", Body=json.dumps(CONFIG).encode())
    client.put_object(Bucket="models", Key="ranker/v30/other.json", Body=b"{}")
    credentials = tmp_path / "s3_credentials.json"
    credentials.write_text(json.dumps(KEYS))
    restricted("create", "secret", "generic", "s3", f"--from-file={credentials}")
    manifest = example("s3")
    manifest["spec"]["endpoint"] = s3
    restricted.apply(manifest)
    cr = wait_up_to_date(restricted, "ranker")
    assert cr["status"]["files"] == 2
    shown = restricted("get", "all,mc,events", "--output=yaml")
    assert "secret_access_key" not in shown


def answers(client: Any) -> bool:
    try:
        client.list_buckets()
    except Exception:  # noqa: BLE001 - not there yet
        return False
    return True


@pytest.mark.slow
def test_what_a_user_sees(images: dict[str, str], hub: Hub, restricted: Kubectl) -> None:
    """The commands of docs/operations/kubectl.md; KUBECTL_TRANSCRIPT names a file that takes what they print."""
    hub.order(commit={"repo": BERT, "seed": 1, "bert": True})
    restricted("apply", f"--filename={EXAMPLES}/minimal.yaml")
    wait_up_to_date(restricted, "bert-base")
    restricted("scale", "mc/bert-base", "--replicas=2")
    restricted.wait_for(MODELS, "bert-base", lambda cr: cr["status"]["server"].get("readyReplicas") == 2, seconds=120)
    printed = {
        command: restricted(*command.split())
        for command in (
            "get mc",
            "get all --selector=modelcache.io/name=bert-base",
            "describe mc bert-base",
            "wait --for=condition=UpToDate mc/bert-base --timeout=30m",
            "scale mc/bert-base --replicas=1",
            "explain mc.spec.storage",
            "explain mc.spec.revision",
        )
    }
    header, row = (line.split() for line in printed["get mc"].splitlines())
    assert header == ["NAME", "READY", "UPTODATE", "REASON", "REVISION", "SIZE", "PROGRESS", "AGE"]
    assert row[:4] == ["bert-base", "True", "True", "UpToDate"]
    described = printed["describe mc bert-base"]
    assert "UpToDate is True: Revision" in described
    assert "Resolved" in described
    assert printed["scale mc/bert-base --replicas=1"] == "modelcache.modelcache.io/bert-base scaled\n"
    assert "condition met" in printed["wait --for=condition=UpToDate mc/bert-base --timeout=30m"]
    explained = printed["explain mc.spec.storage"]
    for words in ("The volume that keeps the snapshots.", "reclaimPolicy", "enum: Delete, Retain", "existingClaim"):
        assert words in explained
    if path := os.environ.get("KUBECTL_TRANSCRIPT"):
        Path(path).write_text("".join(f"$ kubectl {command}\n{text}\n" for command, text in printed.items()))


@pytest.mark.slow
def test_edit_may_keep_models_and_scale_them_and_view_may_look(
    images: dict[str, str], hub: Hub, namespace: Kubectl
) -> None:
    hub.order(commit={"repo": BERT, "seed": 1, "bert": True})
    for role in ("edit", "view"):
        namespace("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}or")
    editor, viewer = namespace.impersonating("editor"), namespace.impersonating("viewor")
    wait_until(
        "the roles are aggregated", 30, lambda: editor("auth", "can-i", "create", MODELS, "--quiet") == "", pause=1
    )
    editor("apply", f"--filename={EXAMPLES}/minimal.yaml")
    wait_up_to_date(viewer, "bert-base")
    editor("scale", "mc/bert-base", "--replicas=2")
    assert viewer("get", "mc", "bert-base", "--output=jsonpath={.spec.server.replicas}") == "2"
    for command in ("delete mc bert-base", "scale mc/bert-base --replicas=1"):
        done = subprocess.run(viewer.argv(*command.split()), capture_output=True, text=True, check=False, timeout=60)
        assert "forbidden" in done.stderr
    editor("delete", "mc", "bert-base", timeout=60)
