"""Programs that know nothing of ModelCache, in pods, with HF_ENDPOINT set to a weight server."""

import json
import subprocess
from pathlib import Path

import pytest

from cluster.node import wait_until
from cluster.product import MINILM, as_account, printed_by, printed_by_all, reader, with_volume
from support.library_versions import install

EXAMPLES = Path(__file__).parents[2] / "examples/hub"
QUIET = {"HF_HOME": "/tmp/hf", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Runs each command of its argument (JSON) and prints what it printed; the first that fails ends it.
RUNS = """
import json, subprocess, sys
for command in json.loads(sys.argv[1]):
    subprocess.run(command, check=True, cwd="/tmp", stderr=subprocess.STDOUT)
"""

# The model by its name, with the token of HF_TOKEN_PATH, against the same files on the volume.
LOADS = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
ours, local = (transformers.AutoModel.from_pretrained(name).eval() for name in sys.argv[1:])
tokens = torch.arange(2000, 2128).reshape(4, 32)
with torch.no_grad():
    print(torch.equal(ours(tokens).last_hidden_state, local(tokens).last_hidden_state))
"""

IS_REFUSED = """
import json, sys, huggingface_hub
said = {}
for name, call in (
    ("info", lambda: huggingface_hub.model_info(sys.argv[1])),
    ("file", lambda: huggingface_hub.hf_hub_download(sys.argv[1], "config.json")),
    ("snapshot", lambda: huggingface_hub.snapshot_download(sys.argv[1])),
):
    try:
        said[name] = ["let in", str(call())]
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


# Runs a command, once the packages that come as a tar file are there.
INSTALLS_AND_RUNS = """
import subprocess, sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode="r|").extractall("/tmp/packages")
subprocess.run(sys.argv[1:], check=True)
"""


def with_examples(namespace, made):
    """A pod of `reader` with the examples at /examples."""
    data = {path.name: path.read_text() for path in EXAMPLES.iterdir() if path.is_file()}
    namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "examples"}, "data": data})
    made["spec"]["volumes"].append({"name": "examples", "configMap": {"name": "examples"}})
    made["spec"]["containers"][0]["volumeMounts"].append({"name": "examples", "mountPath": "/examples"})
    return made


def local_files(model):
    """Where the active snapshot's files are on the volume, as with_volume mounts it."""
    cr = model.get()
    repo = cr["spec"]["repoId"].replace("/", "--")
    return f"/volume/hub/models--{repo}/snapshots/{cr['status']['revision']['active']}"


def test_the_examples_of_transformers_hf_and_curl_in_a_pod(minilm, client_image):
    namespace, commit = minilm.kubectl, minilm.get()["status"]["revision"]["active"]
    commands = [
        ["python3", "/examples/embed_transformers.py", "--compare-with", local_files(minilm)],
        ["bash", "/examples/download.sh", MINILM, "/tmp/model"],
        ["bash", "/examples/curl.sh", MINILM, "model.safetensors"],
        ["sha256sum", "/tmp/model/model.safetensors", f"{local_files(minilm)}/model.safetensors"],
    ]
    pod = reader(
        client_image, "unchanged", RUNS, json.dumps(commands), HF_ENDPOINT="http://minilm-weights:8080", **QUIET
    )
    lines = printed_by(namespace, with_examples(namespace, with_volume(pod, "minilm")), 180).splitlines()
    assert any(line.startswith(f"{MINILM} at {commit}: (2, 384)") for line in lines), lines
    assert "torch.equal(from the endpoint, from local files): True" in lines
    assert f"{MINILM} is at {commit}" in lines
    by_curl, by_hf, on_volume = (line.split()[0] for line in lines[-3:])
    assert by_curl == by_hf == on_volume


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_sentence_transformers_in_a_pod(minilm, client_image, tmp_path):
    namespace, commit = minilm.kubectl, minilm.get()["status"]["revision"]["active"]
    # The client's image has no sentence-transformers: what it lacks comes from this machine, for the image's Python.
    script = "import signal, sys; print(*sys.version_info[:2], sep='.', flush=True); signal.pause()"
    variables = {"HF_ENDPOINT": "http://minilm-weights:8080", "PYTHONPATH": "/tmp/packages", **QUIET}
    pod = reader(client_image, "sentences", script, **variables)
    namespace.apply(with_examples(namespace, with_volume(pod, "minilm")))
    try:
        namespace.wait_for("pod", "sentences", lambda p: p["status"].get("phase") == "Running", seconds=120)
        wait_until("the pod tells its Python", 30, lambda: namespace("logs", "sentences"))
        python = namespace("logs", "sentences").strip()
        install("sentence-transformers", tmp_path, "--only-binary=:all:", f"--python-version={python}")
        example = ("python3", "/examples/embed_sentence_transformers.py", "--compare-with", local_files(minilm))
        command = namespace.argv("exec", "--stdin", "sentences", "--", "python3", "-c", INSTALLS_AND_RUNS, *example)
        with subprocess.Popen(["tar", "-C", tmp_path, "-c", "."], stdout=subprocess.PIPE) as packages:
            done = subprocess.run(
                command, stdin=packages.stdout, capture_output=True, text=True, timeout=300, check=False
            )
    finally:
        namespace.delete("pod", "sentences", wait=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{MINILM} at {commit}: cosine similarity") for line in lines), lines
    assert "equal to local loading: True" in lines


def test_with_tokens_an_account_that_is_named_loads_and_another_is_told_how_to_be(guarded, client_image, installed):
    namespace = guarded.kubectl
    variables = {"HF_ENDPOINT": "http://guarded-weights:8080", "HF_TOKEN_PATH": "/var/run/modelcache/token", **QUIET}
    loads = reader(client_image, "loads", LOADS, "org/guarded", local_files(guarded), **variables)
    refused = reader(installed, "refused", IS_REFUSED, "org/guarded", **variables)
    loaded, said = printed_by_all(
        namespace, as_account(with_volume(loads, "guarded"), "friend"), as_account(refused, "stranger")
    )
    assert loaded.splitlines()[-1] == "True"
    for name, (kind, message) in json.loads(said.splitlines()[-1]).items():
        assert kind == "GatedRepoError", name
        assert f"{namespace.namespace}/stranger" in message
        assert "add it to spec.server.access.serviceAccounts of the ModelCache" in message
