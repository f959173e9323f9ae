"""What goes wrong around a ModelCache: it says what it waits for, and ends in the right state without a hand."""

import json
import time

import pytest

from cluster.kubectl import KubectlError, condition
from cluster.node import wait_until
from cluster.product import MODELS, SYSTEM, Model, children, install, operator_down
from cluster.workloads import claim, container, deployment, pod, pod_spec

FILL = """
import os, sys, time
path = "/volume/neighbour"
with open(path, "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * (1 << 20))
    except OSError:
        print("full", flush=True)
while not os.path.exists("/tmp/stop"):
    time.sleep(0.1)
os.unlink(path)
"""


def running_pod(namespace, component, name="bert"):
    """The name of the pod of a component that runs now, waited for."""
    selector = f"modelcache.io/name={name},modelcache.io/component={component}"

    def found():
        pods = namespace.list("pods", selector)
        return next((p["metadata"]["name"] for p in pods if p["status"]["phase"] == "Running"), None)

    return wait_until(f"a {component} pod of {name}", 60, found, pause=0.2)


@pytest.fixture
def mended(hub):
    """The hub, without faults afterwards."""
    yield hub
    hub.mend()


@pytest.mark.slow
def test_what_is_wrong_with_the_source_is_named_and_heals_when_it_is_mended(installed, mended, namespace, kubectl):
    hub, where = mended, namespace.namespace
    hub.commit(1, repo="org/gated", token="hf_good", megabytes=1)
    for repo in ("org/limited", "org/broken", "org/away"):
        hub.commit(1, repo=repo, megabytes=1)
    hub.order(fault={"match": "/api/models/org/limited*", "times": -1, "status": 429})
    hub.order(fault={"match": "/files/org/broken/*", "times": -1, "status": 503})
    namespace("create", "secret", "generic", "wrong", "--from-literal=hf_access_token=hf_bad")
    away = f"http://hub-away.{where}.svc:8000"
    cases = {
        "missing": ("Resolved", "SecretMissing", {"repoId": "org/gated", "secretRef": {"name": "missing"}}),
        "wrong": ("Resolved", "AuthFailed", {"repoId": "org/gated", "secretRef": {"name": "wrong"}}),
        "absent": ("Resolved", "NotFound", {"repoId": "org/absent"}),
        "limited": ("Resolved", "RateLimited", {"repoId": "org/limited"}),
        "away": ("Resolved", "Unavailable", {"repoId": "org/away", "endpoint": away}),
        "broken": ("Fetched", "Unavailable", {"repoId": "org/broken"}),
    }
    models = {name: Model(namespace, hub, name, **spec) for name, (_, _, spec) in cases.items()}
    for name, (stage, reason, _) in cases.items():
        cr = models[name].wait_for_reason(stage, reason, 180)
        assert condition(cr, "UpToDate")["reason"] == reason
        assert condition(cr, "Ready")["status"] == "False"
        message = condition(cr, stage)["message"]
        assert "tried again" in message
        expected = {"missing": "'missing'", "wrong": "refused the token", "absent": "org/absent"}
        assert expected.get(name, "") in message

    hub.mend()
    hub.commit(1, repo="org/absent", megabytes=1)
    for name in ("missing", "wrong"):
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}}
        namespace.apply({**secret, "stringData": {"hf_access_token": "hf_good"}})
    address = kubectl.within("hub").get("pod", "hub")["status"]["podIP"]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "hub-away"}}
    endpoints = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "hub-away"}}
    namespace.apply(
        {**service, "spec": {"ports": [{"port": 8000}]}},
        {**endpoints, "subsets": [{"addresses": [{"ip": address}], "ports": [{"port": 8000}]}]},
    )
    for model in models.values():
        model.wait()
    everything = namespace("get", "all,events,mc", "--output=yaml")
    assert "hf_good" not in everything
    assert "hf_bad" not in everything


@pytest.mark.slow
def test_fetches_that_are_killed_and_evicted_go_on(installed, mended, namespace):
    hub = mended
    hub.commit(1, repo="org/slow", megabytes=12)
    hub.slow("org/slow", 2e5)
    killed, evicted = (Model(namespace, hub, name, repoId="org/slow") for name in ("killed", "evicted"))
    for model in (killed, evicted):
        model.wait_for_reason("Fetched", "Fetching")
    name = running_pod(namespace, "fetch", "killed")
    namespace("delete", "pod", name, "--force", "--grace-period=0")
    name = running_pod(namespace, "fetch", "evicted")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    path = f"/api/v1/namespaces/{namespace.namespace}/pods/{name}/eviction"
    namespace("create", "--raw", path, "--filename=-", stdin=json.dumps(eviction))
    hub.mend()
    for model in (killed, evicted):
        model.wait()


@pytest.mark.slow
def test_a_volume_that_a_neighbour_fills_during_the_fetch(installed, mended, namespace, python_image):
    hub = mended
    hub.commit(1, repo="org/large", megabytes=60)
    hub.slow("org/large", 3e5)
    namespace.apply(claim("both", "200Mi"))
    model = Model(namespace, hub, repoId="org/large", storage={"existingClaim": "both"})
    model.wait_for_reason("Fetched", "Fetching")
    running_pod(namespace, "fetch")
    spec = pod_spec(container(python_image, "python3", "-c", FILL), claim="both")
    spec["volumes"].append({"name": "tmp", "emptyDir": {}})
    spec["containers"][0]["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})
    namespace.apply(pod("neighbour", spec))
    wait_until("the volume is full", 60, lambda: "full" in namespace("logs", "neighbour", "--ignore-errors"))
    hub.mend()
    cr = model.wait_for_reason("Fetched", "NoSpace", 180)
    assert "tried again" in condition(cr, "Fetched")["message"]
    namespace("exec", "neighbour", "--", "touch", "/tmp/stop")
    model.wait()


@pytest.mark.slow
def test_a_volume_that_is_too_small_says_so_and_is_grown(installed, hub, namespace):
    hub.commit(1, repo="org/large", megabytes=160)
    model = Model(namespace, hub, repoId="org/large", storage={"size": "128Mi"})
    model.wait_for_reason("Fetched", "NoSpace", 120)
    model.apply(storage={"size": "400Mi"})
    model.wait()
    found = namespace.get("pvc", "bert-weights")
    assert found["status"]["capacity"]["storage"] == "400Mi"


@pytest.mark.slow
def test_a_claim_deleted_under_a_running_server_is_made_and_filled_anew(installed, hub, namespace):
    hub.commit(1, repo="org/small", megabytes=1)
    model = Model(namespace, hub, repoId="org/small")
    model.wait()
    old = namespace.get("pvc", "bert-weights")["metadata"]["uid"]
    namespace.delete("pvc", "bert-weights", wait=False)
    namespace.wait_for("pvc", "bert-weights", lambda found: found["metadata"]["uid"] != old, seconds=120)
    namespace.wait_for("pvc", "bert-weights", lambda found: found["status"]["phase"] == "Bound")
    model.wait("Ready")
    model.wait()
    assert "VolumeTerminating" in namespace("describe", "mc", "bert")


@pytest.mark.slow
def test_a_quota_is_named_and_lifting_it_heals(installed, hub, namespace):
    hub.commit(1, repo="org/small", megabytes=1)
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    namespace.apply(quota)
    namespace.wait_for("resourcequota", "none", lambda found: found.get("status", {}).get("hard"))
    model = Model(namespace, hub, repoId="org/small")
    cr = model.wait_for_reason("Resolved", "QuotaExceeded")
    assert "none" in condition(cr, "Resolved")["message"]
    namespace.delete("resourcequota", "none")
    model.wait()


@pytest.mark.slow
def test_a_foreign_deployment_is_untouched_and_when_it_goes_ours_comes(installed, hub, namespace, python_image):
    hub.commit(1, repo="org/small", megabytes=1)
    foreign = deployment("bert-weights", pod_spec(container(python_image, "sleep", "9999")))
    namespace.apply(foreign)
    before = namespace.get("deployment", "bert-weights")
    model = Model(namespace, hub, repoId="org/small")
    model.wait_for_reason("Serving", "NameConflict")
    assert namespace.get("deployment", "bert-weights")["spec"] == before["spec"]
    namespace.delete(MODELS, "bert")
    after = namespace.get("deployment", "bert-weights")
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])
    namespace.delete("deployment", "bert-weights")
    Model(namespace, hub, repoId="org/small").wait()


@pytest.mark.slow
def test_an_image_that_cannot_be_pulled_is_named_and_heals_when_it_is_there(
    installed, hub, namespace, kubectl, machine_cluster
):
    hub.commit(1, repo="org/small", megabytes=1)
    within = kubectl.within(SYSTEM)
    late = f"localhost/modelcache:late-{time.monotonic_ns()}"
    before = within.get("deployment", "modelcache")
    variables = {v["name"]: v for v in before["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert variables["MODELCACHE_IMAGE"]["value"] == installed
    within("set", "env", "deployment/modelcache", f"MODELCACHE_IMAGE={late}")
    try:
        within("rollout", "status", "deployment/modelcache", "--timeout=60s", timeout=70)
        model = Model(namespace, hub, repoId="org/small")
        cr = model.wait_for_reason("Resolved", "ImagePullError")
        assert late in condition(cr, "Resolved")["message"]
        machine_cluster.tag(installed, late)
        model.wait()
    finally:
        install(kubectl, installed, "--force-conflicts")  # the field is kubectl's now, for the API server


def can_be_asked(hub):
    try:
        hub.count()
    except KubectlError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "how"),
    [("kube-apiserver", "kill"), ("kube-apiserver", "freeze"), ("kubelet", "restart"), ("kubelet", "kill")],
)
def test_a_component_that_breaks_during_the_fetch(component, how, installed, mended, namespace, machine_cluster):
    hub = mended
    hub.commit(1, repo="org/slow", megabytes=12)
    hub.slow("org/slow", 2e5)
    model = Model(namespace, hub, repoId="org/slow")
    running_pod(namespace, "fetch")
    if how == "freeze":
        with machine_cluster.frozen(component):
            time.sleep(15)  # longer than a leader may go without renewing its Lease
    elif how == "kill":
        machine_cluster.kill_component(component)
        machine_cluster.start_component(component)
    else:
        machine_cluster.restart_component(component)
    # a kubelet that has just started knows no pods yet, and runs nothing in them
    wait_until("the hub can be asked", 60, lambda: can_be_asked(hub))
    downloads = hub.count("/files/org/slow/*")
    hub.mend()
    model.wait(seconds=240)
    assert hub.count("/files/org/slow/*") <= downloads + 4, "the fetch goes on where it was"
    model.apply(revision="no-such-branch")
    model.wait_for_reason("UpToDate", "NotFound")


STATES = ("planning", "failed", "fetching", "starting", "ready", "rebuilding")


def in_each_state(hub, namespace):
    """A ModelCache in each state of its life, by name."""
    for repo in ("org/delayed", "org/slow", "org/small"):
        hub.commit(1, repo=repo, megabytes=4)
    hub.commit(2, repo="org/small", branch="next", megabytes=4)
    models = {
        "ready": Model(namespace, hub, "ready", repoId="org/small"),
        "rebuilding": Model(namespace, hub, "rebuilding", repoId="org/small"),
        "starting": Model(
            namespace, hub, "starting", repoId="org/small", server={"resources": {"requests": {"memory": "900Gi"}}}
        ),
        "failed": Model(namespace, hub, "failed", repoId="org/absent-for-ever"),
    }
    models["ready"].wait()
    models["rebuilding"].wait()
    hub.order(fault={"match": "/api/models/org/delayed*", "times": -1, "delay": 30})
    hub.slow("org/slow", 2e5)
    models["planning"] = Model(namespace, hub, "planning", repoId="org/delayed")
    models["fetching"] = Model(namespace, hub, "fetching", repoId="org/slow")
    hub.slow("org/small", 2e5)
    models["rebuilding"].apply(revision="next")
    models["failed"].wait_for_reason("Resolved", "NotFound")
    models["starting"].wait_for_reason("Serving", "Unschedulable")
    running_pod(namespace, "plan", "planning")
    running_pod(namespace, "fetch", "fetching")
    running_pod(namespace, "fetch", "rebuilding")
    assert sorted(models) == sorted(STATES)
    return models


@pytest.mark.slow
def test_deleted_in_every_state_nothing_stays_and_the_names_can_be_used_at_once(installed, mended, namespace):
    models = in_each_state(mended, namespace)
    mended.mend()
    for name in models:
        namespace("delete", MODELS, name, "--wait=false")
    again = [Model(namespace, mended, name, repoId="org/small") for name in models]
    for model in again:
        model.wait(seconds=240)
    namespace("delete", MODELS, "--all")
    await_nothing_left(namespace, models)


@pytest.mark.slow
def test_deleted_in_every_state_nothing_stays_without_the_operator(installed, mended, namespace, kubectl):
    models = in_each_state(mended, namespace)
    with operator_down(kubectl):
        namespace("delete", MODELS, "--all")
        await_nothing_left(namespace, models)


def await_nothing_left(namespace, names):
    for name in names:
        wait_until(f"nothing of {name} is left", 120, lambda name=name: not children(namespace, name), pause=0.5)
