"""What fields of the spec do, shown on a real API server with real controllers and one operator for all tests."""

import copy
import http.server
import itertools
import json
import threading
from contextlib import contextmanager
from time import monotonic, sleep

import pytest
import yaml

from modelcache_api import crd
from support.api_server import Refused, api_server, controllers
from support.fake_node import FakeNode
from support.operating import ModelCache, operator, wait_until

IMAGE = "modelcache:test"
PULLING = {
    "phase": "Pending",
    "containerStatuses": [
        {
            "name": "plan", "image": IMAGE, "imageID": "", "ready": False, "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with api_server() as running, controllers(running):
        running.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
        for name, grows in (("grows", True), ("fixed", False)):
            body = {"metadata": {"name": name}, "provisioner": "test", "allowVolumeExpansion": grows}
            running.create("/apis/storage.k8s.io/v1/storageclasses", body)
        yield running


@pytest.fixture(scope="module")
def node(server):
    with FakeNode(server) as playing:
        yield playing


@pytest.fixture(scope="module", autouse=True)
def running(server, node, tmp_path_factory):
    with operator(server, tmp_path_factory.mktemp("operator"), MODELCACHE_LEASE_NAME="") as process:
        yield process


@pytest.fixture
def namespace(server, request):
    name = "t-" + str(abs(hash(request.node.name)))[:12]
    server.create("/api/v1/namespaces", {"metadata": {"name": name}})
    return name


def claims(namespace):
    return f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"


def message(model, type_):
    return next(c["message"] for c in model.get()["status"]["conditions"] if c["type"] == type_)


def names(model, plural):
    return [name for kind, name in model.children() if kind == plural]


def owners(model):
    claim = model.children()["persistentvolumeclaims", "bert-weights"]
    return [reference["uid"] for reference in claim["metadata"].get("ownerReferences", [])]


def test_a_retained_claim_outlives_its_model_cache_and_the_next_of_the_name_adopts_it(server, namespace):
    model = ModelCache(server, namespace, storage={"reclaimPolicy": "Retain"})
    model.wait_for(UpToDate="True")
    assert owners(model) == []
    before = model.children()["persistentvolumeclaims", "bert-weights"]["metadata"]["uid"]
    server.delete(model.path)
    wait_until(lambda: [kind for kind, _ in model.children()] == ["persistentvolumeclaims"])
    heir = ModelCache(server, namespace)
    cr = heir.wait_for(UpToDate="True")
    claim = heir.children()["persistentvolumeclaims", "bert-weights"]
    assert claim["metadata"]["uid"] == before
    assert owners(heir) == [cr["metadata"]["uid"]]
    heir.change(storage={"reclaimPolicy": "Retain"})
    wait_until(lambda: owners(heir) == [])
    heir.change(storage={"reclaimPolicy": "Delete"})
    wait_until(lambda: owners(heir) == [cr["metadata"]["uid"]])
    server.delete(heir.path)
    wait_until(lambda: not heir.children())


def test_a_claim_of_that_name_without_our_labels_is_no_heirloom(server, namespace):
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    theirs = server.create(claims(namespace), {"metadata": {"name": "bert-weights"}, "spec": spec})
    model = ModelCache(server, namespace)
    model.wait_for(Fetched="NameConflict", Ready="NameConflict")
    now = server.get(f"{claims(namespace)}/bert-weights")
    assert "ownerReferences" not in now["metadata"]
    assert now["metadata"]["uid"] == theirs["metadata"]["uid"]
    server.delete(f"{claims(namespace)}/bert-weights")
    # a claim without our labels is not watched: it is seen within a minute, or at once when somebody asks
    server.merge(model.path, {"metadata": {"annotations": {"modelcache.io/reconcile-at": "1"}}})
    model.wait_for(UpToDate="True")


def test_an_existing_claim_is_used_as_it_is_and_stays(server, namespace):
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "3Gi"}}}
    server.create(claims(namespace), {"metadata": {"name": "mine"}, "spec": spec})
    model = ModelCache(server, namespace, storage={"existingClaim": "mine"})
    cr = model.wait_for(UpToDate="True")
    assert cr["status"]["volume"] == {"claimName": "mine"}
    assert names(model, "persistentvolumeclaims") == ["mine"]
    server.delete(model.path)
    wait_until(lambda: [kind for kind, _ in model.children()] == ["persistentvolumeclaims"])
    kept = server.get(f"{claims(namespace)}/mine")["metadata"]
    assert not {"ownerReferences", "labels"} & kept.keys()


def test_a_claim_grows_where_its_class_allows_it(server, namespace):
    model = ModelCache(server, namespace, storage={"size": "2Gi", "storageClassName": "grows"})
    model.wait_for(UpToDate="True")
    model.change(storage={"size": "5Gi"})

    def requested():
        claim = model.children()["persistentvolumeclaims", "bert-weights"]
        return claim["spec"]["resources"]["requests"]["storage"]

    wait_until(lambda: requested() == "5Gi")
    model.change(storage={"size": "1Gi"})
    model.wait_for(UpToDate="True")
    assert requested() == "5Gi", "a volume never shrinks"


def test_growth_that_the_class_refuses_is_said_and_harms_nothing(server, namespace):
    model = ModelCache(server, namespace, storage={"size": "2Gi", "storageClassName": "fixed"})
    model.wait_for(UpToDate="True")
    model.change(storage={"size": "5Gi"})
    wait_until(lambda: "could not be grown to 5.0 GiB" in message(model, "Fetched"))
    model.wait_for(UpToDate="True", Ready="True")
    model.change(revision="v2")
    cr = model.wait_for(UpToDate="True")
    assert cr["status"]["revision"]["active"] == "b" * 40, "what fits is fetched all the same"


def test_suspend_stops_a_running_fetch_and_resuming_runs_it(server, node, namespace):
    node.hold.add("fetch")
    try:
        model = ModelCache(server, namespace)
        model.wait_for(Fetched="Fetching")
        wait_until(lambda: [n for n in names(model, "jobs") if "-fetch-" in n])
        model.change(suspend=True)
        model.wait_for(Fetched="Suspended", UpToDate="Suspended")
        wait_until(lambda: not [n for n in names(model, "jobs") if "-fetch-" in n])
    finally:
        node.hold.discard("fetch")
    model.change(suspend=False)
    model.wait_for(UpToDate="True")
    model.change(suspend=True, revision="v2")
    model.wait_for(UpToDate="Suspended", Ready="True")
    assert names(model, "deployments") == ["bert-weights"], "what is served stays served"


def test_no_replicas_no_servers_and_scale_brings_them(server, namespace):
    model = ModelCache(server, namespace, server={"replicas": 0})
    model.wait_for(Ready="MountOnly", Serving="MountOnly", UpToDate="True")
    assert names(model, "deployments") == names(model, "services") == []
    server.merge(f"{model.path}/scale", {"spec": {"replicas": 2}})
    model.wait_for(Ready="Serving")
    wait_until(lambda: model.get()["status"]["server"]["readyReplicas"] == 2)
    scale = server.get(f"{model.path}/scale")
    assert scale["status"] == {
        "replicas": 2,
        "selector": "modelcache.io/component=server,modelcache.io/name=bert",
    }
    server.merge(f"{model.path}/scale", {"spec": {"replicas": 0}})
    model.wait_for(Ready="MountOnly")
    wait_until(lambda: names(model, "deployments") == names(model, "services") == [])


def test_token_access_hands_the_clusters_own_keys_to_the_servers(server, namespace):
    accounts = [{"name": "app"}, {"namespace": "batch", "name": "job"}]
    model = ModelCache(server, namespace, server={"access": {"mode": "Token", "serviceAccounts": accounts}})
    model.wait_for(UpToDate="True")
    path = f"/api/v1/namespaces/{namespace}/configmaps/bert-weights-keys"
    keys = server.get("/openid/v1/jwks")
    assert keys["keys"]
    assert json.loads(server.get(path)["data"]["jwks.json"]) == keys
    command = model.children()["deployments", "bert-weights"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--token-issuer={server.get('/.well-known/openid-configuration')['issuer']}" in command
    assert {f"--allow={namespace}/app", "--allow=batch/job"} <= set(command)
    server.merge(path, {"data": {"jwks.json": '{"keys": []}'}})
    wait_until(lambda: json.loads(server.get(path)["data"]["jwks.json"]) == keys)
    model.change(server={"access": {"mode": "Open", "serviceAccounts": []}})
    model.wait_for(UpToDate="True")

    def is_gone():
        try:
            server.get(path)
        except Refused as error:
            return error.status == 404
        return False

    wait_until(is_gone)


def test_a_moved_branch_is_seen_when_the_interval_has_passed(server, node, namespace):
    model = ModelCache(server, namespace, refresh={"interval": "5m"})
    model.wait_for(UpToDate="True")
    before = node.ran["plan", "main"]
    status = {"plan": {"time": "2026-01-01T00:00:00Z"}}
    server.merge(f"{model.path}/status", {"status": status})
    wait_until(lambda: model.get()["status"]["plan"]["time"] > "2026-01-02")
    assert node.ran["plan", "main"] == before + 1
    model.wait_for(UpToDate="True", Ready="True")


def test_a_job_that_cannot_pull_its_image_says_so_and_a_mended_spec_replaces_it(server, node, namespace):
    node.stuck["plan"] = (IMAGE, PULLING)
    try:
        model = ModelCache(server, namespace)
        model.wait_for(Resolved="ImagePullError", UpToDate="ImagePullError", Ready="ImagePullError")
        [stuck] = names(model, "jobs")
        model.change(fetch={"imagePullSecrets": [{"name": "pull"}]})
        wait_until(lambda: names(model, "jobs") and names(model, "jobs") != [stuck])
    finally:
        del node.stuck["plan"]
    model.wait_for(UpToDate="True")


def test_a_quota_on_pods_that_only_events_tell_of_is_the_reason(server, namespace):
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    server.create(quotas, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    wait_until(lambda: server.get(f"{quotas}/none").get("status", {}).get("hard"))
    model = ModelCache(server, namespace)
    model.wait_for(Resolved="QuotaExceeded", Ready="QuotaExceeded")
    assert "exceeded quota: none" in message(model, "Resolved")
    server.delete(f"{quotas}/none")
    model.wait_for(UpToDate="True", seconds=120)


def test_a_job_of_ours_that_nothing_waits_for_is_stopped(server, namespace):
    model = ModelCache(server, namespace)
    cr = model.wait_for(UpToDate="True")
    owner = {
        "apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "name": "bert", "uid": cr["metadata"]["uid"],
    }  # fmt: skip
    labels = {"modelcache.io/name": "bert", "modelcache.io/component": "fetch", "modelcache.io/key": "orphan"}
    pod = {"restartPolicy": "Never", "containers": [{"name": "fetch", "image": "x"}]}
    server.create(
        f"/apis/batch/v1/namespaces/{namespace}/jobs",
        {
            "metadata": {"name": "bert-fetch-orphan", "labels": labels, "ownerReferences": [owner]},
            "spec": {"suspend": True, "template": {"spec": pod}},
        },
    )
    wait_until(lambda: "bert-fetch-orphan" not in names(model, "jobs"))
    model.wait_for(UpToDate="True", Ready="True")


def test_each_change_of_a_condition_is_an_event(server, namespace):
    model = ModelCache(server, namespace)
    model.wait_for(UpToDate="True")

    def told():
        events = server.get(f"/api/v1/namespaces/{namespace}/events?fieldSelector=involvedObject.kind=ModelCache")
        return [event["message"].split(":")[0] for event in events["items"]]

    for change in ("Resolved is Unknown", "Resolved is True", "Fetched is True", "Serving is True", "Ready is True"):
        wait_until(lambda change=change: told().count(change) == 1, seconds=10)
    assert len(told()) < 30


@contextmanager
def rules_of_an_earlier_version(server):
    """The CRD as it was when nothing was said about revisions."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/modelcaches.modelcache.io"
    versions = server.get(path)["spec"]["versions"]
    earlier = copy.deepcopy(versions)
    spec = earlier[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["revision"]["x-kubernetes-validations"]
    server.merge(path, {"spec": {"versions": earlier}})
    try:
        yield
    finally:
        server.merge(path, {"spec": {"versions": versions}})


def test_a_stored_spec_that_todays_rules_refuse_is_told_and_what_is_served_stays(server, namespace):
    model = ModelCache(server, namespace)
    before = model.wait_for(UpToDate="True")["status"]

    def is_taken():
        try:
            model.change(revision="a.lock")
        except Refused:
            return False
        return True

    assert not is_taken()
    with rules_of_an_earlier_version(server):
        wait_until(is_taken)
    status = model.wait_for(Resolved="InvalidSpec", UpToDate="InvalidSpec", Ready="Serving", Fetched="True")["status"]
    assert "spec.revision: 'a.lock' is no branch" in message(model, "UpToDate")
    assert (status["digest"], status["revision"]) == (before["digest"], before["revision"])
    assert names(model, "deployments") == ["bert-weights"]
    model.change(revision="v2")
    model.wait_for(UpToDate="True", Ready="True")


@contextmanager
def progress_of(address):
    """Answers as a fetch pod does on its status port, each time with more bytes."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(monotonic())
            body = json.dumps({"bytes": len(asked) * 2**20, "totalBytes": 100 * 2**20, "bytesPerSecond": 7}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer((address, 9091), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield asked
        finally:
            listening.shutdown()
            thread.join()


@pytest.mark.slow
def test_progress_is_shown_and_written_at_most_each_ten_seconds(server, node, namespace):
    address = "127.77.0.1"
    running = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    node.stuck["fetch"] = (IMAGE, running)
    try:
        with progress_of(address) as asked:
            model = ModelCache(server, namespace)
            model.wait_for(Fetched="Fetching")
            seen = {}
            until = monotonic() + 35
            while monotonic() < until:
                progress = model.get()["status"].get("progress", {})
                if progress.get("bytes"):
                    seen.setdefault(progress["bytes"], (monotonic(), progress["percent"], progress["bytesPerSecond"]))
                sleep(0.1)
        times = [moment for moment, _, _ in seen.values()]
        assert len(times) >= 3
        assert all(later - earlier > 9 for earlier, later in itertools.pairwise(times))
        assert len(asked) <= len(times) + 1
        assert [(percent, speed) for _, percent, speed in seen.values()][:2] == [("1%", 7), ("2%", 7)]
    finally:
        del node.stuck["fetch"]
