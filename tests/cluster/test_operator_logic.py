"""The operator as a process against a real API server with real controllers; only nodes are played."""

from time import monotonic, sleep

import pytest
import yaml

from modelcache_api import crd
from support.api_server import Refused, api_server, controllers
from support.fake_node import COMMITS, FakeNode
from support.operating import ModelCache, operator, wait_until


@pytest.fixture(scope="module")
def server():
    with api_server() as running, controllers(running):
        running.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
        yield running


@pytest.fixture(scope="module")
def node(server):
    with FakeNode(server) as playing:
        yield playing


@pytest.fixture
def namespace(server, request):
    name = "t-" + str(abs(hash(request.node.name)))[:12]
    server.create("/api/v1/namespaces", {"metadata": {"name": name}})
    return name


def test_apply_to_ready_and_a_rebuild_and_back(server, node, namespace, tmp_path):
    with operator(server, tmp_path) as running:
        model = ModelCache(server, namespace)
        cr = model.wait_for(UpToDate="True", Ready="True")
        assert cr["status"]["revision"]["short"] == "a" * 12
        assert not cr["metadata"].get("finalizers")
        assert not cr["metadata"].get("annotations")
        deployment = model.children()["deployments", "bert-weights"]
        for revision in ("v2", "main"):
            model.change(revision=revision)
            cr = model.wait_for(UpToDate="True")
            assert cr["status"]["revision"]["active"] == COMMITS[revision]
        after = model.children()["deployments", "bert-weights"]
        assert after["spec"] == deployment["spec"]
        reasons = {e["reason"] for e in server.get(f"/api/v1/namespaces/{namespace}/events")["items"]}
        assert {"Activated", "UpToDate", "Serving", "Fetching"} <= reasons
        assert running.stop() == 0


def test_in_steady_state_nothing_is_asked_and_a_restart_writes_nothing(server, node, namespace, tmp_path):
    with operator(server, tmp_path, MODELCACHE_LEASE_NAME="") as running:
        model = ModelCache(server, namespace)
        model.wait_for(UpToDate="True")
        calls = running.metric("modelcache_operator_api_calls_total")

        def quiet():
            nonlocal calls
            before, calls = calls, running.metric("modelcache_operator_api_calls_total")
            own = {key: n for key, n in calls.items() if 'what="leases"' not in key}
            return all(before.get(key) == n for key, n in own.items())

        sleep(2)
        quiet()
        sleep(3)
        assert quiet(), "calls for a healthy ModelCache"
        before = model.children() | {("cr", ""): model.get()}
        running.kill()
    with operator(server, tmp_path, MODELCACHE_LEASE_NAME="") as running:
        wait_until(lambda: running.metric("modelcache_operator_reconciles_total"))
        sleep(3)
        after = model.children() | {("cr", ""): model.get()}
        versions = [{k: o["metadata"]["resourceVersion"] for k, o in state.items()} for state in (before, after)]
        assert versions[0] == versions[1]
        calls = running.metric("modelcache_operator_api_calls_total")
        verbs = {key for key in calls if 'what="leases"' not in key}
        assert not any(f'verb="{verb}"' in key for key in verbs for verb in ("apply", "create", "delete"))


def test_a_failing_revision_keeps_the_old_one_and_the_annotation_tries_again(server, node, namespace, tmp_path):
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        model.wait_for(UpToDate="True")
        node.failures["plan", "v3"] = ("AuthFailed", 66)
        try:
            model.change(revision="v3")
            model.wait_for(UpToDate="AuthFailed", Ready="True")
        finally:
            del node.failures["plan", "v3"]
        server.merge(model.path, {"metadata": {"annotations": {"modelcache.io/reconcile-at": "1"}}})
        cr = model.wait_for(UpToDate="True")
        assert cr["status"]["revision"]["active"] == COMMITS["v3"]


def test_killed_again_and_again_it_gets_there_and_runs_each_job_once(server, node, namespace, tmp_path):
    """SIGKILL at ever later moments of the way; without the Lease, so that the next one acts at once."""
    model = ModelCache(server, namespace, revision="v2")
    ran = node.ran.copy()
    for moment in range(8):
        with operator(server, tmp_path, MODELCACHE_LEASE_NAME="") as running:
            wait_until(
                lambda running=running: running.metric("modelcache_operator_leading").get("modelcache_operator_leading")
            )
            sleep(0.25 * moment)
            running.kill()
    with operator(server, tmp_path, MODELCACHE_LEASE_NAME=""):
        model.wait_for(UpToDate="True")
    assert node.ran["plan", "v2"] - ran["plan", "v2"] == 1
    assert node.ran["fetch", "v2"] - ran["fetch", "v2"] == 1


def test_drift_and_deletions_are_repaired_and_a_deleted_claim_is_filled_anew(server, node, namespace, tmp_path):
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        model.wait_for(UpToDate="True")
        root = f"/api/v1/namespaces/{namespace}"
        server.delete(f"{root}/services/bert-weights")
        server.merge(f"/apis/apps/v1/namespaces/{namespace}/deployments/bert-weights", {"spec": {"replicas": 3}})
        wait_until(lambda: ("services", "bert-weights") in model.children())
        wait_until(lambda: model.children()["deployments", "bert-weights"]["spec"]["replicas"] == 1)
        server.delete(f"/apis/apps/v1/namespaces/{namespace}/deployments/bert-weights")
        model.wait_for(UpToDate="True")
        old = model.children()["persistentvolumeclaims", "bert-weights"]["metadata"]["uid"]
        server.delete(f"{root}/persistentvolumeclaims/bert-weights")

        def replaced():
            claim = model.children().get(("persistentvolumeclaims", "bert-weights"))
            return claim and claim["metadata"]["uid"] != old

        wait_until(replaced)
        model.wait_for(UpToDate="True", Ready="True")


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_running_job_that_somebody_deletes_is_made_anew(server, node, namespace, tmp_path, component):
    node.hold.add(component)
    try:
        with operator(server, tmp_path, MODELCACHE_LEASE_NAME=""):
            model = ModelCache(server, namespace)

            def job():
                return next(
                    (o for (k, n), o in model.children().items() if k == "jobs" and f"-{component}-" in n), None
                )

            first = wait_until(job)
            path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{first['metadata']['name']}"
            server.request("DELETE", path, {"propagationPolicy": "Background"})
            wait_until(lambda: (found := job()) and found["metadata"]["uid"] != first["metadata"]["uid"])
            node.hold.discard(component)
            model.wait_for(UpToDate="True")
    finally:
        node.hold.discard(component)


def test_a_foreign_deployment_is_not_touched(server, node, namespace, tmp_path):
    pods = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "theirs"}]}}
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    theirs = server.create(
        path,
        {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "bert-weights"},
            "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": pods},
        },
    )  # fmt: skip
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        model.wait_for(Serving="NameConflict", UpToDate="NameConflict", Ready="NameConflict")
        assert server.get(f"{path}/bert-weights")["spec"] == theirs["spec"]


@pytest.mark.slow
def test_a_quota_is_the_reason_and_lifting_it_heals(server, node, namespace, tmp_path):
    quotas = f"/api/v1/namespaces/{namespace}/resourcequotas"
    server.create(quotas, {"metadata": {"name": "small"}, "spec": {"hard": {"persistentvolumeclaims": "0"}}})
    wait_until(lambda: server.get(f"{quotas}/small").get("status", {}).get("hard"))
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        cr = model.wait_for(Fetched="QuotaExceeded")
        assert "small" in next(c["message"] for c in cr["status"]["conditions"] if c["type"] == "Fetched")
        server.delete(f"{quotas}/small")
        model.wait_for(UpToDate="True", seconds=90)


def test_deleted_with_the_operator_down_nothing_stays(server, node, namespace, tmp_path):
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        model.wait_for(UpToDate="True")
    server.delete(model.path)
    wait_until(lambda: not model.children())
    with pytest.raises(Refused):
        model.get()


def test_the_same_name_created_at_once_starts_anew(server, node, namespace, tmp_path):
    with operator(server, tmp_path):
        model = ModelCache(server, namespace)
        model.wait_for(UpToDate="True")
        old = model.get()["metadata"]["uid"]
        server.delete(model.path)
        model = ModelCache(server, namespace)
        cr = model.wait_for(UpToDate="True", seconds=90)
        assert cr["metadata"]["uid"] != old
        owners = [o["metadata"]["ownerReferences"][0]["uid"] for (k, _), o in model.children().items() if k != "pods"]
        assert set(owners) - {cr["metadata"]["uid"]} == set() or len(set(owners)) <= 2


def test_a_stampede_keeps_to_the_budget(server, node, namespace, tmp_path):
    node.hold.add("fetch")
    try:
        with operator(server, tmp_path, MODELCACHE_MAX_FETCHES_PER_HOST="2", MODELCACHE_MAX_FETCHES="3"):
            models = [ModelCache(server, namespace, f"m{n}") for n in range(6)]

            def fetches():
                return [n for kind, n in models[0].children() if kind == "jobs" and "-fetch-" in n]

            wait_until(lambda: len(fetches()) == 2)
            wait_until(lambda: sum("WaitingForTurn" in m.conditions().get("Fetched", ()) for m in models) == 4)
            assert len(fetches()) == 2
            node.hold.discard("fetch")
            for model in models:
                model.wait_for(UpToDate="True", seconds=90)
    finally:
        node.hold.discard("fetch")


def test_an_operator_of_named_namespaces_leaves_the_others_alone(server, node, namespace, tmp_path):
    other = f"{namespace}-other"
    server.create("/api/v1/namespaces", {"metadata": {"name": other}})
    with operator(server, tmp_path, MODELCACHE_NAMESPACES=namespace):
        stranger = ModelCache(server, other)
        ModelCache(server, namespace).wait_for(UpToDate="True")
        assert "status" not in stranger.get()
        assert not stranger.children()
        server.delete(stranger.path)


def test_an_upgrade_fetches_nothing_again_and_rolls_one_server_after_the_other(server, node, namespace, tmp_path):
    def images():
        found = [o["spec"]["template"] for (kind, _), o in models[0].children().items() if kind == "deployments"]
        return [template["spec"]["containers"][0]["image"] for template in found]

    with operator(server, tmp_path):
        models = [ModelCache(server, namespace, f"m{n}") for n in range(3)]
        for model in models:
            model.wait_for(UpToDate="True")
    ran = node.ran.copy()
    node.hold.add("server")
    try:
        upgraded = {"MODELCACHE_IMAGE": "modelcache:next", "MODELCACHE_MAX_ROLLOUTS": "1"}
        with operator(server, tmp_path, MODELCACHE_NAMESPACES=namespace, **upgraded):
            waiting = [("False", "RollingOut"), ("False", "WaitingForTurn"), ("False", "WaitingForTurn")]
            wait_until(lambda: sorted(m.conditions()["UpToDate"] for m in models) == waiting)
            in_line = [m for m in models if "WaitingForTurn" in m.conditions()["UpToDate"]]
            before = [m.get()["metadata"]["resourceVersion"] for m in in_line]
            sleep(3)
            assert images().count("modelcache:next") == 1
            assert [m.get()["metadata"]["resourceVersion"] for m in in_line] == before, "who waits has nothing to write"
            assert all(m.conditions()["Ready"][0] == "True" for m in models), "the old ones serve until the new do"
            node.hold.discard("server")
            wait_until(lambda: images() == ["modelcache:next"] * 3)
            for model in models:
                model.wait_for(UpToDate="True")
    finally:
        node.hold.discard("server")
    assert node.ran == ran


def test_an_admission_webhook_that_is_down_is_told_in_the_status(server, node, namespace, tmp_path):
    """Only the operator's log knew: the API server answers 500, as if it were ill itself."""
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    webhook = {
        "name": "down.example.com",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["*"], "resources": ["deployments"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    server.create(path, {"metadata": {"name": "down"}, "webhooks": [webhook]})
    try:
        with operator(server, tmp_path):
            model = ModelCache(server, namespace)
            cr = model.wait_for(Serving="Refused", UpToDate="Refused", Ready="Refused")
            message = next(c["message"] for c in cr["status"]["conditions"] if c["type"] == "UpToDate")
            assert 'failed calling webhook "down.example.com"' in message
            server.merge(f"{path}/down", {"webhooks": [webhook | {"rules": []}]})
            model.change(server={"cacheSize": "128Mi"})
            model.wait_for(UpToDate="True")
    finally:
        server.delete(f"{path}/down")


@pytest.mark.slow
def test_a_standby_takes_over_soon_after_a_kill_and_at_once_after_a_stop(server, node, namespace, tmp_path):
    def leads(running):
        return running.metric("modelcache_operator_leading").get("modelcache_operator_leading") == 1

    with operator(server, tmp_path, MODELCACHE_LEASE_NAME="ha") as first:
        wait_until(lambda: leads(first))
        with operator(server, tmp_path, MODELCACHE_LEASE_NAME="ha") as second:
            wait_until(lambda: second.metric("modelcache_operator_leading"))
            assert not leads(second)
            began = monotonic()
            assert first.stop() == 0
            wait_until(lambda: leads(second), 10)
            assert monotonic() - began < 5
            with operator(server, tmp_path, MODELCACHE_LEASE_NAME="ha") as third:
                wait_until(lambda: third.metric("modelcache_operator_leading"))
                began = monotonic()
                second.kill()
                wait_until(lambda: leads(third), 25)
                assert monotonic() - began < 20
