"""The examples are taken by the models that the CRD is made from, and pods in them are restricted."""

import re
from pathlib import Path

import pytest
import yaml

from modelcache_api import crd
from modelcache_api.load import load_manifest
from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.resources import names
from support.operator_world import World

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = sorted((REPOSITORY / "examples/kubernetes").glob("*.yaml"))


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_an_example_is_what_it_says(path):
    [document] = documents(path)
    if document["kind"] == "ModelCache":
        load_manifest(path)
        ModelCacheSpec.model_validate(document["spec"], context={"cluster": True})
        return
    if document["kind"] == "NetworkPolicy":
        assert document["spec"]["podSelector"]["matchLabels"].items() <= names.labels("any", names.SERVER).items()
        assert {port["port"] for rule in document["spec"]["ingress"] for port in rule["ports"]} == {9090, 8080, 9091}
        return
    pod = document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest")


def test_what_kubectl_is_shown_to_print_is_what_the_operator_says():
    """docs/operations/kubectl.md is of a run on a cluster; names of Jobs depend on the cluster's own hub."""

    def without_hash(text):
        return re.sub(r"-fetch-[0-9a-f]{10}-1", "-fetch-HASH-1", text)

    shown = without_hash((REPOSITORY / "docs/operations/kubectl.md").read_text())
    [example] = documents(REPOSITORY / "examples/kubernetes/minimal.yaml")
    world = World(name=example["metadata"]["name"], **example["spec"])
    result = {"commit": re.search(r"Active: +([0-9a-f]{40})", shown)[1], "files": 2, "bytes": 1182038}
    said = set()
    for act in (
        lambda: None,
        lambda: world.finish("plan", **result),
        lambda: world.finish("fetch", **result, downloadedBytes=result["bytes"]),
        world.servers_are_up,
    ):
        act()
        for _ in range(3):
            conditions = world.step().status["conditions"]
            said |= {without_hash(f"{c['type']} is {c['status']}: {c['message']}") for c in conditions}
    assert said == set(re.findall(r"modelcache-operator  (\w+ is \w+: .*)", shown))
    columns = crd.custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]
    header = re.search(r"\$ kubectl get mc\n +(.*)", shown)[1]
    assert header.split() == ["NAME", *(column["name"].upper() for column in columns)]


def test_every_kind_of_source_has_its_example():
    repos = [d["spec"]["repoId"] for path in EXAMPLES for d in documents(path) if d["kind"] == "ModelCache"]
    for scheme in ("s3://", "gs://"):
        assert any(repo.startswith(scheme) for repo in repos)
    assert any("://" not in repo for repo in repos)
