"""The product as a user has it: helm install, kubectl apply, a pod that reads; then changes under load."""

import json

import pytest

from cluster.kubectl import has_condition
from cluster.node import wait_until
from cluster.product import (
    MINILM,
    MODELS,
    SYSTEM,
    Model,
    children,
    operator_down,
    printed_by,
    reader,
    run_helm,
)
from cluster.workloads import container, job, pod_spec

STREAMS = """
import sys, torch, transformers, modelcache
transformers.logging.set_verbosity_error()
tokens = {"input_ids": torch.arange(2000, 2128).reshape(2, 64), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
plain = transformers.BertModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad(), modelcache.StreamingBertModel("minilm", cache_size=3) as streamed:
    ours, theirs = streamed(**tokens), plain(**tokens)
print(all(torch.equal(ours[name], theirs[name]) for name in ("last_hidden_state", "pooler_output")))
"""

READS_WHOLE = """
import hashlib, sys, modelcache
for name in sys.argv[1:]:
    print(hashlib.sha256(modelcache.load_state_dict(name)["w"].numpy().tobytes()).hexdigest())
"""

# Reads the first revision, pinned, and in turn whatever is active, until /tmp/stop is there. Prints how often each was
# read, what was seen, and what failed.
READS_ALL_THE_TIME = """
import hashlib, json, os, sys, time, urllib.request

def get(path, port=8080):
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as answer:
        return answer.read()

def snapshot(digest):
    seed = json.loads(get(f"/v1/snapshots/{digest}/config.json"))["seed"]
    return f"{seed} {hashlib.sha256(get(f'/v1/snapshots/{digest}/model.safetensors')).hexdigest()}"

first, host = sys.argv[1:3]
reads, failed, pinned, active = 0, [], set(), set()
while not os.path.exists("/tmp/stop"):
    try:
        pinned.add(snapshot(first))
        active.add(snapshot(json.loads(get("/active", 9091))["digest"]))
        reads += 1
    except Exception as error:
        failed.append(repr(error))
    time.sleep(0.1)
print(json.dumps({"reads": reads, "failed": failed, "pinned": sorted(pinned), "active": sorted(active)}))
"""

# The client library, one whole model after the other.
LOADS_ALL_THE_TIME = """
import hashlib, json, os, sys, time, modelcache
reads, failed, active = 0, [], set()
while not os.path.exists("/tmp/stop"):
    try:
        active.add(hashlib.sha256(modelcache.load_state_dict(sys.argv[1])["w"].numpy().tobytes()).hexdigest())
        reads += 1
    except Exception as error:
        failed.append(repr(error))
    time.sleep(0.1)
print(json.dumps({"reads": reads, "failed": failed, "active": sorted(active)}))
"""


def test_helm_test_finds_the_rights_exact(installed, kubectl):
    run_helm(kubectl, "test", "modelcache", f"--namespace={SYSTEM}", "--timeout=120s")


def test_minilm_from_apply_to_torch_equal_in_a_pod_of_the_client_image(minilm, hub, client_image):
    namespace, cr = minilm.kubectl, minilm.get()
    commit = cr["status"]["revision"]["active"]
    # plain transformers loads from the hub, the other model from the weight server
    pod = reader(client_image, "streams", STREAMS, MINILM, HF_ENDPOINT=hub.url, HF_HOME="/tmp/hf")
    assert printed_by(namespace, pod, 180).splitlines()[-1] == "True"
    shown = namespace("get", "mc", "minilm")
    assert [*shown.split()[:7]] == ["NAME", "READY", "UPTODATE", "REASON", "REVISION", "SIZE", "PROGRESS"], shown
    assert commit[:12] in shown
    described = namespace("describe", "mc", "minilm")
    for event in ("Fetching", "Activated", "Serving", "UpToDate"):
        assert event in described
    assert "org/name" in namespace("explain", "mc.spec.repoId")
    namespace("wait", "--for=condition=Ready", "mc/minilm", "--timeout=5s")
    for part in namespace.list("pods", "modelcache.io/name=minilm"):
        assert part["spec"]["automountServiceAccountToken"] is False
        assert not any("serviceAccountToken" in str(volume) for volume in part["spec"]["volumes"])


def test_the_runtime_image_has_the_product_and_no_torch(namespace, runtime_image):
    check = "import importlib.util, modelcache_volume, modelcache_server; print(importlib.util.find_spec('torch'))"
    namespace.apply(job("check", pod_spec(container(runtime_image, "python3", "-c", check))))
    namespace.wait_for("job", "check", has_condition("Complete"))
    assert namespace("logs", "job/check") == "None\n"


def test_a_rebuild_under_load_a_bad_revision_and_a_rollback_that_downloads_nothing(
    installed, hub, namespace, client_image
):
    states = {seed: hub.commit(seed, repo="org/moves", branch=f"b{seed}", megabytes=2) for seed in (1, 2, 3, 4)}
    model = Model(namespace, hub, repoId="org/moves", revision="b1", revisionHistoryLimit=3)
    digest = model.wait()["status"]["digest"]
    readers = [f"reader-{n}" for n in range(4)]
    for name in readers:
        namespace.apply(reader(installed, name, READS_ALL_THE_TIME, digest, "bert-weights"))
    namespace.apply(reader(client_image, "loads", LOADS_ALL_THE_TIME, "bert", HF_HOME="/tmp"))
    for name in (*readers, "loads"):
        namespace.wait_for("pod", name, lambda p: p["status"]["phase"] == "Running", seconds=60)

    for seed in (2, 3, 4):
        model.apply(revision=f"b{seed}")
        cr = model.wait()  # at once after the apply: UpToDate is still True, of the generation before
        assert cr["status"]["revision"]["active"] == states[seed]["commit"], "wait returned early"

    model.apply(revision="no-such-branch")
    model.wait_for_reason("UpToDate", "NotFound")
    assert model.condition("Ready")["status"] == "True"

    downloads = hub.count("/files/org/moves/*")
    model.apply(revision="b1")
    assert model.wait()["status"]["digest"] == digest
    assert hub.count("/files/org/moves/*") == downloads, "a rollback downloads no file"

    for name in (*readers, "loads"):
        namespace("exec", name, "--", "touch", "/tmp/stop")
    for name in (*readers, "loads"):
        namespace.wait_for("pod", name, lambda p: p["status"]["phase"] == "Succeeded", seconds=60)
    pairs = {f"{seed} {made['sha256']}" for seed, made in states.items()}
    for name in readers:
        seen = json.loads(namespace("logs", name))
        assert seen["failed"] == []
        assert seen["pinned"] == [f"1 {states[1]['sha256']}"], "the first revision stays readable"
        assert set(seen["active"]) <= pairs, "torn"
        assert len(seen["active"]) > 1
        assert seen["reads"] > 20
    loaded = json.loads(namespace("logs", "loads").splitlines()[-1])
    assert loaded["failed"] == []
    assert set(loaded["active"]) <= {made["tensors"] for made in states.values()}, "torn"
    assert loaded["reads"] > 20


def test_without_servers_it_is_ready_to_mount_and_deleting_takes_everything_also_without_the_operator(
    installed, hub, namespace, kubectl
):
    hub.commit(1)
    model = Model(namespace, hub)
    model.wait()
    namespace("scale", "mc/bert", "--replicas=0")
    model.wait_for_reason("Serving", "MountOnly")
    assert model.condition("Ready")["status"] == "True"
    assert namespace.get("deployment", "bert-weights") is None
    with operator_down(kubectl):
        namespace.delete(MODELS, "bert")
        wait_until("nothing is left", 90, lambda: not children(namespace, "bert"), pause=0.5)


@pytest.mark.slow
def test_replicas_come_and_go_and_each_serves(installed, hub, namespace, client_image):
    made = hub.commit(1)
    model = Model(namespace, hub)
    model.wait()
    namespace("scale", f"{MODELS}/bert", "--replicas=2")
    namespace.wait_for(MODELS, "bert", lambda cr: cr["status"]["server"].get("readyReplicas") == 2, seconds=120)
    assert printed_by(namespace, reader(client_image, "reads", READS_WHOLE, "bert")).split()[-1] == made["tensors"]
