"""What the chart makes of its values. Rendered by the real helm where there is one (`make e2e` builds it)."""

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from modelcache_api import crd
from modelcache_api.resource import ModelCacheSpec
from modelcache_operator import rights
from modelcache_operator.resources import names, server
from modelcache_operator.settings import Defaults, from_environment

MODEL_CACHE = {"metadata": {"name": "bert", "namespace": "ns", "uid": "u1"}}
CHART = Path(__file__).parents[3] / "helm/modelcache"


def helm_program():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelcache-clusters/helm"
    return shutil.which("helm") or next((str(path) for path in sorted(cache.glob("*/helm"))), None)


def helm(*arguments):
    if (program := helm_program()) is None:
        pytest.skip("there is no helm on PATH, and `make e2e` has not built one yet")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@cache
def render(*arguments):
    """Rendered objects by kind, name and namespace; not to be changed, as equal arguments share them."""
    done = helm("template", "release", str(CHART), "--namespace=system", *arguments)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    return {(d["kind"], d["metadata"]["name"], d["metadata"].get("namespace", "")): d for d in documents}


def of_kind(objects, kind):
    return [o for (k, _, _), o in objects.items() if k == kind]


def settings_of(objects, folder):
    """What the operator of rendered objects would read."""
    [deployment] = of_kind(objects, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    environment = {e["name"]: e.get("value", "from-a-field") for e in container["env"]}
    path = folder / "defaults.yaml"
    path.write_text(objects["ConfigMap", "release-modelcache-defaults", "system"]["data"]["defaults.yaml"])
    return from_environment(environment | {"MODELCACHE_DEFAULTS": str(path)})


def version():
    return yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]


def test_the_chart_carries_the_generated_crd():
    assert crd.main(["--check", str(CHART / "files/modelcaches.yaml")]) == 0


def test_chart_and_package_have_one_version():
    project = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'version = "{version()}"' in project


def test_every_value_has_its_place_in_the_schema():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def known(values, part, path):
        assert part.get("additionalProperties") is False or "$ref" in part or "properties" not in part, path
        for name, value in values.items():
            assert name in part["properties"], f"{path}.{name}"
            if isinstance(value, dict) and "properties" in part["properties"][name]:
                known(value, part["properties"][name], f"{path}.{name}")

    known(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


def test_the_charts_defaults_are_those_that_the_operator_reads():
    values = yaml.safe_load((CHART / "values.yaml").read_text())["defaults"]
    assert set(values) == {field.alias for field in Defaults.model_fields.values()}
    Defaults.model_validate({name: value for name, value in values.items() if value is not None})


def test_helm_lint_is_content():
    done = helm("lint", "--strict", str(CHART), "--values", str(CHART / "values-ha.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_crd_stays_when_the_chart_goes_unless_it_is_told_otherwise():
    [definition] = of_kind(render(), "CustomResourceDefinition")
    assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert definition["spec"] == crd.custom_resource_definition()["spec"]
    [definition] = of_kind(render("--set=crds.keep=false"), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in (definition["metadata"].get("annotations") or {})
    assert of_kind(render("--set=crds.enabled=false"), "CustomResourceDefinition") == []


def granted(role):
    return {
        (group, *resource.partition("/")[::2], verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_operator_is_granted_what_it_needs_and_nothing_else():
    needed = {(r.group, r.resource, r.subresource, r.verb) for r in rights.NEEDED}
    objects = render()
    assert granted(objects["ClusterRole", "release-modelcache-system", ""]) == needed
    leader = granted(objects["Role", "release-modelcache-leader", "system"])
    assert leader == {(r.group, r.resource, r.subresource, r.verb) for r in rights.LEASE}
    assert not {(r.group, r.resource, r.subresource, r.verb) for r in rights.FORBIDDEN} & needed


def test_in_named_namespaces_there_is_no_right_in_the_cluster():
    objects = render("--set=operator.namespaces={a,b}", "--set=rbac.aggregate=false")
    assert of_kind(objects, "ClusterRole") == []
    for namespace in ("a", "b"):
        assert objects["RoleBinding", "release-modelcache", namespace]["roleRef"]["kind"] == "Role"
        assert granted(objects["Role", "release-modelcache", namespace])
    [binding] = of_kind(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == "system:service-account-issuer-discovery"


def test_the_clusters_own_roles_get_model_caches():
    objects = render()
    for role, verbs in (("view", {"get", "list", "watch"}), ("edit", {"create", "update", "patch", "delete"})):
        found = objects["ClusterRole", f"release-modelcache-system-{role}", ""]
        assert found["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{role}"] == "true"
        assert verbs <= set(found["rules"][0]["verbs"])
        assert "modelcaches/scale" in found["rules"][0]["resources"], "`kubectl scale` reads before it writes"


def test_pods_are_restricted():
    objects = render()
    [deployment] = of_kind(objects, "Deployment")
    [test] = of_kind(objects, "Pod")
    for pod in (deployment["spec"]["template"]["spec"], test["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip


def test_users_can_be_left_to_the_platform(tmp_path):
    """Helm takes a value that is null away, so that the operator must not have a user of its own for what is absent."""
    open_shift = render("--set=operator.runAsUser=null,defaults.runAsUser=null,defaults.fsGroup=null")
    [deployment] = of_kind(open_shift, "Deployment")
    [test] = of_kind(open_shift, "Pod")
    for pod in (deployment["spec"]["template"]["spec"], test["spec"]):
        assert "runAsUser" not in pod["securityContext"]
    settings = settings_of(open_shift, tmp_path)
    assert (settings.defaults.run_as_user, settings.defaults.fs_group) == (None, None)
    settings = settings_of(render(), tmp_path)
    assert (settings.defaults.run_as_user, settings.defaults.fs_group) == (65532, 65532)


def test_a_disruption_budget_only_where_there_is_more_than_one():
    assert of_kind(render(), "PodDisruptionBudget") == []
    objects = render(f"--values={CHART / 'values-ha.yaml'}")
    [budget] = of_kind(objects, "PodDisruptionBudget")
    [deployment] = of_kind(objects, "Deployment")
    assert deployment["spec"]["replicas"] == 2
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert not any("version" in key for key in deployment["spec"]["selector"]["matchLabels"])


def test_the_network_policy_lets_metrics_in_and_what_is_needed_out():
    [policy] = of_kind(render(), "NetworkPolicy")
    [deployment] = of_kind(render(), "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    [into] = policy["spec"]["ingress"]
    assert into == {"ports": [{"port": "metrics", "protocol": "TCP"}]}
    out = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert out == {53, 443, 6443, 9091}
    [asked] = [rule for rule in policy["spec"]["egress"] if "to" in rule]
    for component in (names.FETCH, names.SERVER):
        assert asked["to"][0]["podSelector"]["matchLabels"].items() <= names.labels("any", component).items()
    scraped = '--set-json=networkPolicy.metricsFrom=[{"namespaceSelector":{}}]'
    [policy] = of_kind(render(scraped), "NetworkPolicy")
    assert policy["spec"]["ingress"][0]["from"] == [{"namespaceSelector": {}}]
    assert of_kind(render("--set=networkPolicy.enabled=false"), "NetworkPolicy") == []


def test_monitoring_is_behind_switches():
    assert of_kind(render(), "ServiceMonitor") == []
    objects = render("--set=metrics.serviceMonitor.enabled=true,metrics.dashboard.enabled=true")
    operator, servers = (o["spec"] for o in of_kind(objects, "ServiceMonitor"))
    [metrics] = of_kind(objects, "Service")
    assert operator["selector"]["matchLabels"].items() <= metrics["metadata"]["labels"].items()
    balanced, headless = server.services(MODEL_CACHE, ModelCacheSpec.model_validate({"repoId": "org/name"}))
    chosen = servers["selector"]["matchLabels"].items()
    assert chosen <= balanced["metadata"]["labels"].items()
    assert not chosen <= headless["metadata"]["labels"].items(), "each pod is scraped once"
    for monitor, service in ((operator, metrics), (servers, balanced)):
        assert {e["port"] for e in monitor["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}
    dashboard = objects["ConfigMap", "release-modelcache-dashboard", "system"]
    json.loads(dashboard["data"]["modelcache.json"])


def test_the_dashboard_asks_for_metrics_that_exist():
    from modelcache_operator.metrics import Metrics as OperatorMetrics
    from modelcache_server.metrics import Metrics as ServerMetrics

    names = {"modelcache_operator_api_calls"}
    for registry in (OperatorMetrics().registry, ServerMetrics().registry):
        names |= {metric.name for metric in registry.collect()}
    asked = re.findall(r"modelcache_\w+", (CHART / "files/dashboard.json").read_text())
    assert asked
    assert {re.sub("_(total|bucket)$", "", name) for name in asked} <= names


def test_the_environment_is_what_the_operator_reads(tmp_path):
    arguments = [
        "--set=operator.namespaces={a,b}",
        "--set=operator.maxFetches=3",
        "--set=defaults.endpoint=https://hub",
    ]
    objects = render(*arguments, "--set=image.digest=sha256:" + "a" * 64)
    settings = settings_of(objects, tmp_path)
    assert settings.namespaces == ("a", "b")
    assert settings.max_fetches == 3
    [deployment] = of_kind(objects, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert settings.image == container["image"] == "modelcache@sha256:" + "a" * 64
    assert settings.lease_name == "release-modelcache"
    assert settings.defaults.endpoint == "https://hub"


def notes(*arguments):
    """What `helm install` says at its end, in paragraphs."""
    done = helm("install", "release", str(CHART), "--namespace=system", "--dry-run=client", "--output=json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["info"]["notes"].split("\n\n")


def test_the_notes_can_be_pasted():
    first, before, commands, readers, rights_, uninstall = notes()
    assert first == f"ModelCache {version()} is installed."
    assert before.endswith(":")
    manifest, end, after = commands.partition("\nEOF\n")
    command, begin, manifest = manifest.partition(" <<EOF\n")
    assert (command, begin, end) == ("kubectl apply -f -", " <<EOF\n", "\nEOF\n"), (
        "a shell takes no EOF with spaces before it"
    )
    model = yaml.safe_load(manifest)
    ModelCacheSpec.model_validate(model["spec"])
    name = model["metadata"]["name"]
    assert after == f"kubectl wait --for=condition=UpToDate mc/{name} --timeout=30m\nkubectl get mc"
    assert f"{names.weights_name(name)}:{server.GRPC_PORT}," in readers
    assert f"HF_ENDPOINT=http://{names.weights_name(name)}:{server.HTTP_PORT}." in readers
    assert rights_.startswith("Whoever may create ModelCaches")
    assert uninstall.startswith("`helm uninstall` leaves the CRD")


def test_the_notes_say_what_was_chosen():
    first, *_, uninstall = notes("--set=operator.namespaces={a,b}", "--set=crds.keep=false")
    assert first == f"ModelCache {version()} is installed for the namespaces a, b."
    assert uninstall.startswith("WARNING: crds.keep is false: `helm uninstall` deletes the CRD")


def test_a_long_release_name_fits_into_the_names_of_services():
    done = helm("template", "r" * 53, str(CHART), "--set=metrics.serviceMonitor.enabled=true")
    assert done.returncode == 0, done.stderr
    names = [d["metadata"]["name"] for d in yaml.safe_load_all(done.stdout) if d and d["kind"] == "Service"]
    assert names
    assert all(len(name) <= 63 for name in names)


DEFAULTS_TYPOS = [
    'defaults.imagePullSecrets=[{"nam":"x"}]',
    'defaults.env=[{"name":"A","vale":"b"}]',
    'defaults.env=[{"name":"A","valueFrom":{"configMapKeyRef":{"name":"c","key":"k"}}}]',
    'defaults.tolerations=[{"keys":"gpu"}]',
    'defaults.tolerations=[{"operator":"exists"}]',
    'defaults.fetchResources={"limits":{"memory":true}}',
    "imagePullSecrets=[{}]",
]


@pytest.mark.parametrize("value", DEFAULTS_TYPOS)
def test_what_the_operator_would_not_take_is_refused_before_it_is_installed(value):
    done = helm("template", "release", str(CHART), f"--set-json={value}")
    assert done.returncode != 0
    assert "at '" in done.stderr


def test_all_that_defaults_can_say_reaches_the_operator(tmp_path):
    said = {
        "endpoint": "https://hub.example.com",
        "storageClassName": "fast",
        "imagePullSecrets": [{"name": "pull"}],
        "caBundle": {"configMap": "ca", "key": "root.pem"},
        "env": [
            {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
            {"name": "LOGIN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
        ],
        "fetchResources": {"limits": {"memory": "1Gi", "cpu": 2}, "requests": {"cpu": "500m"}},
        "serverResources": {"limits": {"memory": "2Gi"}},
        "tolerations": [
            {"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
            {"key": "a", "value": "b"},
        ],
        "runAsUser": 1000,
        "fsGroup": 2000,
    }
    assert set(said) == {field.alias for field in Defaults.model_fields.values()}
    settings = settings_of(render(f"--set-json=defaults={json.dumps(said)}"), tmp_path)
    assert settings.defaults == Defaults.model_validate(said)


@pytest.mark.parametrize(
    "value",
    ["operator.replica=2", "operator.logLevel=LOUD", "crds.keep=maybe", "defaults.endpoint=hub", "image.repository="],
)
def test_wrong_values_are_refused(value):
    done = helm("template", "release", str(CHART), f"--set={value}")
    assert done.returncode != 0
    assert "schema" in done.stderr or "Invalid" in done.stderr or "at '" in done.stderr
