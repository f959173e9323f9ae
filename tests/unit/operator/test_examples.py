"""The examples are taken by the models that the CRD is made from, and pods in them are restricted."""

from pathlib import Path

import pytest
import yaml

from modelcache_api.load import load_manifest
from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.resources import names

EXAMPLES = sorted((Path(__file__).parents[3] / "examples/kubernetes").glob("*.yaml"))


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


def test_every_kind_of_source_has_its_example():
    repos = [d["spec"]["repoId"] for path in EXAMPLES for d in documents(path) if d["kind"] == "ModelCache"]
    for scheme in ("s3://", "gs://"):
        assert any(repo.startswith(scheme) for repo in repos)
    assert any("://" not in repo for repo in repos)
