"""The product as a user has it: helm install, kubectl apply, a pod that reads; then changes and faults."""

import pytest

from cluster.kubectl import KubectlError
from cluster.product import MODELS, SYSTEM, Hub, Model, install, reader, run_helm

READ = """
import hashlib, sys, urllib.request
digest, host = sys.argv[1:3]
with urllib.request.urlopen(f"http://{host}:8080/v1/snapshots/{digest}/model.safetensors", timeout=30) as answer:
    print(hashlib.file_digest(answer, "sha256").hexdigest())
"""

READ_ALL_THE_TIME = """
import hashlib, sys, time, urllib.request
digest, host, seconds = sys.argv[1:4]
url, good, bad, seen = f"http://{host}:8080/v1/snapshots/{digest}/model.safetensors", 0, 0, set()
until = time.monotonic() + float(seconds)
while time.monotonic() < until:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            seen.add(hashlib.file_digest(answer, "sha256").hexdigest())
        good += 1
    except Exception as error:
        bad += 1
        print("failed:", error, flush=True)
    time.sleep(0.05)
print(good, bad, *seen)
"""


@pytest.fixture(scope="module")
def installed(kubectl, runtime_image):
    install(kubectl, runtime_image)
    yield runtime_image
    run_helm(kubectl, "uninstall", "modelcache", f"--namespace={SYSTEM}", "--wait")


@pytest.fixture(scope="module")
def hub(kubectl, python_image):
    kubectl("create", "namespace", "hub")
    try:
        yield Hub(kubectl.within("hub"), python_image)
    finally:
        kubectl.delete("namespace", "hub", wait=False)


def read(namespace, image, model, name="reader"):
    """The sha256 of the weights as a pod gets them from the Service."""
    namespace.delete("pod", name)
    digest = model.get()["status"]["digest"]
    namespace.apply(reader(image, name, READ, digest, f"{model.name}-weights"))
    namespace.wait_for("pod", name, lambda p: p["status"]["phase"] in {"Succeeded", "Failed"}, seconds=60)
    return namespace("logs", name).strip()


def test_helm_test_finds_the_rights_exact(installed, kubectl):
    run_helm(kubectl, "test", "modelcache", f"--namespace={SYSTEM}", "--timeout=120s")


def test_apply_wait_and_read(installed, hub, namespace):
    made = hub.commit(1)
    model = Model(namespace, hub)
    cr = model.wait()
    assert cr["status"]["revision"]["active"] == made["commit"]
    assert read(namespace, installed, model) == made["sha256"]
    shown = namespace("get", "mc", "bert")
    assert made["commit"][:12] in shown
    assert "UpToDate" in shown
    assert "Repo" in namespace("explain", "mc.spec.repoId") or "org/name" in namespace("explain", "mc.spec.repoId")
    for part in namespace.list("pods", "modelcache.io/name=bert"):
        assert part["spec"]["automountServiceAccountToken"] is False
        assert not any("serviceAccountToken" in str(v) for v in part["spec"]["volumes"])


def test_a_rebuild_under_load_and_a_rollback_that_downloads_nothing(installed, hub, namespace):
    first = hub.commit(1)
    model = Model(namespace, hub, revisionHistoryLimit=3)
    digest = model.wait()["status"]["digest"]
    for n in range(3):
        namespace.apply(reader(installed, f"reader-{n}", READ_ALL_THE_TIME, digest, "bert-weights", "45"))
    for n in range(3):
        namespace.wait_for("pod", f"reader-{n}", lambda p: p["status"]["phase"] == "Running")
    for seed in (2, 3):
        made = hub.commit(seed, branch=f"b{seed}")
        model.apply(revision=f"b{seed}")
        cr = model.wait()
        assert cr["status"]["revision"]["active"] == made["commit"], "wait returned early"
        assert read(namespace, installed, model) == made["sha256"]
    before = hub.order(downloads=True)["downloads"]
    model.apply(revision=first["commit"])
    cr = model.wait()
    assert cr["status"]["digest"] == digest
    assert hub.order(downloads=True)["downloads"] == before, "a rollback downloads no file"
    for n in range(3):
        namespace.wait_for("pod", f"reader-{n}", lambda p: p["status"]["phase"] == "Succeeded", seconds=120)
        good, bad, *seen = namespace("logs", f"reader-{n}").split()
        assert (int(bad), seen) == (0, [first["sha256"]])
        assert int(good) > 10


def test_a_bad_revision_leaves_the_old_one_served_with_the_reason(installed, hub, namespace):
    made = hub.commit(1)
    model = Model(namespace, hub)
    model.wait()
    model.apply(revision="no-such-branch")
    cr = model.wait_for_reason("UpToDate", "NotFound")
    assert next(c for c in cr["status"]["conditions"] if c["type"] == "Ready")["status"] == "True"
    assert read(namespace, installed, model) == made["sha256"]
    model.apply(revision=None)
    model.wait()


def test_a_missing_secret_is_named_and_creating_it_heals(installed, hub, namespace):
    hub.order(commit={"repo": "org/private", "seed": 5, "token": "hf_good"})
    model = Model(namespace, hub, repoId="org/private", secretRef={"name": "hf"})
    cr = model.wait_for_reason("Resolved", "SecretMissing")
    message = next(c["message"] for c in cr["status"]["conditions"] if c["type"] == "Resolved")
    assert "'hf'" in message
    assert "hf_access_token" in message
    namespace("create", "secret", "generic", "hf", "--from-literal=hf_access_token=hf_good")
    namespace("annotate", "--overwrite", MODELS, "bert", "modelcache.io/reconcile-at=now")
    model.wait()
    assert "hf_good" not in namespace("get", "all,events,mc", "--output=yaml")


def test_the_operators_account_reads_no_secret_and_no_log(installed, kubectl):
    operator = kubectl.impersonating(f"system:serviceaccount:{SYSTEM}:modelcache")
    assert operator("auth", "can-i", "list", "jobs", "--all-namespaces").strip() == "yes"
    for right in ("get secrets", "list secrets", "get pods/log", "create pods/exec", "create pods"):
        with pytest.raises(KubectlError) as refusal:  # it says "no" and ends with 1
            operator("auth", "can-i", *right.split(), "--all-namespaces")
        assert not refusal.value.stderr.strip()


def test_deleting_takes_everything_also_without_the_operator(installed, hub, namespace, kubectl):
    hub.commit(1)
    model = Model(namespace, hub)
    model.wait()
    within = kubectl.within(SYSTEM)
    within("scale", "deployment/modelcache", "--replicas=0")
    try:
        namespace.delete(MODELS, "bert")
        for kind in ("deployment", "service", "job", "persistentvolumeclaim"):
            namespace("wait", "--for=delete", kind, "--selector=modelcache.io/name=bert", "--timeout=90s", timeout=100)
    finally:
        within("scale", "deployment/modelcache", "--replicas=1")
        within("rollout", "status", "deployment/modelcache", "--timeout=60s", timeout=70)


def test_scaling_and_a_pod_that_mounts_the_volume(installed, hub, namespace):
    hub.commit(1)
    model = Model(namespace, hub)
    model.wait()
    namespace("scale", f"{MODELS}/bert", "--replicas=2")
    namespace.wait_for(MODELS, "bert", lambda cr: cr["status"]["server"].get("readyReplicas") == 2, seconds=120)
    namespace("scale", f"{MODELS}/bert", "--replicas=0")
    cr = model.wait_for_reason("Serving", "MountOnly")
    assert next(c for c in cr["status"]["conditions"] if c["type"] == "Ready")["status"] == "True"
    assert namespace.get("deployment", "bert-weights") is None
