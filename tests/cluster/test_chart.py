"""What the chart renders, with every switch on, is taken by a real API server to the last field."""

import json
import subprocess

import pytest
import yaml

from cluster.product import CHART
from cluster.programs import helm
from support.api_server import api_server

ALL_SWITCHES = {
    "imagePullSecrets": [{"name": "pull"}],
    "commonLabels": {"team": "ml"},
    "operator": {
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "podAnnotations": {"note": "x"},
        "podLabels": {"note": "x"},
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    },
    "serviceAccount": {"annotations": {"note": "x"}},
    "defaults": {"caBundle": {"configMap": "ca"}, "endpoint": "https://hub.example.com"},
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}], "apiServerPorts": [8443]},
    "metrics": {"serviceMonitor": {"enabled": True}, "dashboard": {"enabled": True}},
}
PLURALS = {"NetworkPolicy": "networkpolicies"}


@pytest.fixture(scope="module")
def server():
    with api_server() as running:
        for namespace in ("system", "a", "b"):
            running.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        yield running


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [f"--values={CHART / 'values-ha.yaml'}", *(f"--set-json={k}={json.dumps(v)}" for k, v in ALL_SWITCHES.items())],
        ["--set=operator.namespaces={a,b},operator.runAsUser=null,defaults.runAsUser=null,defaults.fsGroup=null"],
    ],
    ids=["defaults", "every switch, highly available", "named namespaces, platform's users"],
)
def test_the_api_server_takes_what_the_chart_renders(server, arguments):
    command = [str(helm()), "template", "release", str(CHART), "--namespace=system", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    kinds = set()
    for made in yaml.safe_load_all(done.stdout):
        if not made or made["kind"] == "ServiceMonitor":  # Prometheus' operator is not there
            continue
        version, namespace, kind = made["apiVersion"], made["metadata"].get("namespace"), made["kind"]
        path = f"/apis/{version}" if "/" in version else f"/api/{version}"
        path += f"/namespaces/{namespace}" if namespace else ""
        plural = PLURALS.get(kind, f"{kind.lower()}s")
        server.create(f"{path}/{plural}?dryRun=All&fieldValidation=Strict", made)
        kinds.add(kind)
    assert {"Deployment", "ServiceAccount", "ConfigMap", "NetworkPolicy", "CustomResourceDefinition", "Pod"} <= kinds
