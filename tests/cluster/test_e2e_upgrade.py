"""Operator and chart upgraded, rolled back, taken away, installed again: nothing is fetched again, nobody notices."""

import json

from cluster.images import newer_image, product_image
from cluster.kubectl import condition
from cluster.product import MODELS, SYSTEM, Model, install, reader, run_helm

READS = """
import hashlib, json, os, sys, time, urllib.request
url, reads, failed, seen = sys.argv[1], 0, [], set()
while not os.path.exists("/tmp/stop"):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            seen.add(hashlib.file_digest(answer, "sha256").hexdigest())
        reads += 1
    except Exception as error:
        failed.append(repr(error))
    time.sleep(0.05)
print(json.dumps({"reads": reads, "failed": failed, "seen": sorted(seen)}))
"""


def image_of(found):
    return found["spec"]["template"]["spec"]["containers"][0]["image"]


def running_image(namespace):
    """The digest of the image that the newest server runs."""
    pods = namespace.list("pods", "modelcache.io/name=bert,modelcache.io/component=server")
    newest = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])
    return newest["status"]["containerStatuses"][0]["imageID"]


def test_an_upgrade_and_a_rollback_fetch_nothing_again_and_no_read_fails(
    installed, hub, namespace, kubectl, machine_cluster
):
    made = hub.commit(1, repo="org/stays", megabytes=2)
    model = Model(namespace, hub, repoId="org/stays")
    digest = model.wait()["status"]["digest"]
    url = f"http://bert-weights:8080/v1/snapshots/{digest}/model.safetensors"
    namespace.apply(reader(installed, "reads", READS, url))
    namespace.wait_for("pod", "reads", lambda p: p["status"]["phase"] == "Running")
    asked = hub.count("*")
    jobs = {job["metadata"]["uid"] for job in namespace.list("jobs")}
    claim = namespace.get("pvc", "bert-weights")["metadata"]["uid"]
    newer_archive = newer_image(product_image("runtime"))
    machine_cluster.load(newer_archive)
    newer, before = newer_archive.name, running_image(namespace)

    def rolled(image):
        def done(found):
            status = found["status"]
            return image_of(found) == image and (
                status.get("observedGeneration", 0) >= found["metadata"]["generation"]
                and status.get("updatedReplicas") == status.get("replicas") == status.get("availableReplicas") == 1
            )

        return done

    install(kubectl, newer)
    namespace.wait_for("deployment", "bert-weights", rolled(newer), seconds=120)
    assert running_image(namespace) != before, "another image, not the same one under another name"
    run_helm(kubectl, "rollback", "modelcache", f"--namespace={SYSTEM}", "--wait", "--timeout=120s")
    namespace.wait_for("deployment", "bert-weights", rolled(installed), seconds=120)
    assert running_image(namespace) == before
    assert condition(model.wait(), "Ready")["status"] == "True"

    run_helm(kubectl, "uninstall", "modelcache", f"--namespace={SYSTEM}", "--wait", "--timeout=60s")
    assert namespace.get(MODELS, "bert") is not None, "the CRD, and with it every ModelCache, is kept"
    install(kubectl, installed)
    assert model.wait()["status"]["digest"] == digest

    namespace("exec", "reads", "--", "touch", "/tmp/stop")
    namespace.wait_for("pod", "reads", lambda p: p["status"]["phase"] == "Succeeded")
    seen = json.loads(namespace("logs", "reads"))
    assert (seen["failed"], seen["seen"]) == ([], [made["sha256"]])
    assert seen["reads"] > 50
    assert hub.count("*") == asked, "the hub was asked for nothing"
    assert {job["metadata"]["uid"] for job in namespace.list("jobs")} == jobs
    assert namespace.get("pvc", "bert-weights")["metadata"]["uid"] == claim
