"""`access.tls` and `fetch.caBundle`: a cache that speaks TLS is the hub of another one, which trusts its authority."""

import pytest

from cluster.kubectl import condition
from cluster.product import Model
from support.proxies import private_certificate

pytestmark = pytest.mark.slow
KEY = "-----BEGIN PRIVATE KEY-----"


def test_a_cache_is_the_hub_of_another_that_trusts_its_authority(installed, hub, namespace, tmp_path):
    chain, authority = private_certificate(tmp_path, f"first-weights.{namespace.namespace}.svc")
    certificate, _, key = chain.read_text().partition(KEY)
    metadata = {"name": "of-first-weights"}
    namespace.apply(
        {"kind": "Secret", "type": "kubernetes.io/tls", "stringData": {"tls.crt": certificate, "tls.key": KEY + key}}
        | {"apiVersion": "v1", "metadata": metadata},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"root.pem": authority.read_text()}},
    )
    hub.order(commit={"repo": "org/private", "seed": 1, "bert": True})
    tls = {"access": {"tls": {"secretName": "of-first-weights"}}}
    first = Model(namespace, hub, "first", repoId="org/private", server=tls).wait()["status"]
    assert first["endpoint"]["http"] == f"https://first-weights.{namespace.namespace}.svc:8080"

    second = Model(namespace, hub, "second", repoId="org/private", endpoint=first["endpoint"]["http"])
    told = condition(second.wait_for_reason("Resolved", "Unavailable", 180), "Resolved")["message"]
    assert "certificate" in told.lower()
    second.apply(fetch={"caBundle": {"configMap": "of-first-weights", "key": "root.pem"}})
    found = second.wait()["status"]
    assert (found["digest"], found["files"]) == (first["digest"], first["files"])
