"""Programs that know nothing of ModelCache, with HF_ENDPOINT set to the weight server, and what can go wrong then."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from safetensors.torch import load

from modelcache_server import TlsSettings
from support.cli import SMALL, make_folder, serving, write_manifest
from support.hub_load import ask_at_once
from support.hub_world import NAME, REPO, hub_files, hub_world
from support.library_versions import NEWEST, interpreter
from support.models import TINY, BertFiles, minilm, save_bert
from support.processes import REPOSITORY
from support.proxies import HttpFront
from support.server_security import write_certificate
from support.server_volume import Running, make_volume, random_bytes, running, wait_until

EXAMPLES = REPOSITORY / "examples" / "hub"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FILES = hub_files(1)
TRANSFORMERS = [NEWEST, pytest.param("transformers-4_57", marks=pytest.mark.slow)]


def run(server: Running | str, command: list[str | Path], folder: Path, **variables: str):
    """A program with HF_ENDPOINT set, in a folder of its own; the finished process."""
    endpoint = server if isinstance(server, str) else f"http://127.0.0.1:{server.addresses.http}"
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, env={**os.environ, **settings, **variables}, cwd=folder, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[tuple[Running, str]]:
    """The real MiniLM, fetched from a hub and served."""
    with hub_world(tmp_path_factory.mktemp("minilm")) as world:
        root = minilm()
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        commit = world.hub.commit(MINILM, {name: path for name, path in files.items() if "cache" not in name})
        world.fetch(repo=MINILM)
        with running(world.volume, cache_bytes=128 << 20) as server:
            yield server, commit


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[tuple[Running, str]]:
    """A small repo, fetched from a hub and served."""
    with hub_world(tmp_path_factory.mktemp("small")) as world:
        commit = world.commit(FILES)
        world.fetch()
        with running(world.volume, name=NAME) as server:
            yield server, commit


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_computes_what_it_does_from_local_files(model, tmp_path, version):
    server, commit = model
    script = EXAMPLES / "embed_transformers.py"
    done = run(server, [interpreter(version), script, "--compare-with", minilm()], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{MINILM} at {commit}: (2, 384)" in done.stdout
    assert "torch.equal(from the endpoint, from local files): True" in done.stdout


@pytest.mark.parametrize("version", TRANSFORMERS)
def test_transformers_has_every_parameter_equal(model, tmp_path, version):
    script = (
        "import sys, torch, transformers\n"
        "from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline\n"
        "repo, local = sys.argv[1:]\n"
        "ours, theirs = (AutoModel.from_pretrained(name).state_dict() for name in (repo, local))\n"
        "assert ours.keys() == theirs.keys()\n"
        "assert all(torch.equal(ours[name], theirs[name]) for name in ours)\n"
        "assert AutoConfig.from_pretrained(repo).hidden_size == 384\n"
        "one, other = (pipeline('feature-extraction', model=name)('a cat') for name in (repo, local))\n"
        "assert one == other\n"
        "print('equal', len(ours), transformers.__version__)\n"
    )
    done = run(model[0], [interpreter(version), "-c", script, MINILM, minilm()], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = "5." if version == NEWEST else "4.57."
    assert re.search(rf"equal \d+ {re.escape(expected)}", done.stdout)


@pytest.mark.slow
def test_sentence_transformers_embeds_as_from_local_files(model, tmp_path):
    server, commit = model
    script = EXAMPLES / "embed_sentence_transformers.py"
    done = run(server, [interpreter("sentence-transformers"), script, "--compare-with", minilm()], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{MINILM} at {commit}: " in done.stdout
    assert "equal to local loading: True" in done.stdout


def test_hf_download_and_verify(small, tmp_path):
    done = run(small[0], [EXAMPLES / "download.sh", REPO, "model"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for path, content in FILES.items():
        assert (tmp_path / "model" / path).read_bytes() == content


def test_hf_cache_verify_notices_a_changed_file(small, tmp_path):
    server, commit = small
    assert run(server, ["hf", "download", REPO], tmp_path).returncode == 0
    (changed,) = (tmp_path / "home").rglob(f"snapshots/{commit}/onnx/model.onnx")
    blob = changed.resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    done = run(server, ["hf", "cache", "verify", REPO], tmp_path)
    assert done.returncode != 0
    assert "onnx/model.onnx" in done.stdout + done.stderr


@pytest.mark.parametrize("begun", ["nothing", "this commit's", "another one's"])
def test_the_curl_example(small, tmp_path, begun):
    server, commit = small
    half = FILES["model.safetensors"][: len(FILES["model.safetensors"]) // 2]
    if begun == "this commit's":
        (tmp_path / f"model.safetensors.{commit}.part").write_bytes(half)
    elif begun == "another one's":
        (tmp_path / "model.safetensors").write_bytes(bytes(len(half)))
    done = run(server, [EXAMPLES / "curl.sh", REPO, "model.safetensors"], tmp_path)
    assert done.returncode == 0, done.stderr
    content = FILES["model.safetensors"]
    first, listing, header, digest = done.stdout.splitlines()
    assert first == f"{REPO} is at {commit}"
    assert {entry["path"] for entry in json.loads(listing)} >= set(FILES)
    assert int(header) == int.from_bytes(content[:8], "little")
    assert digest.split() == [hashlib.sha256(content).hexdigest(), "model.safetensors"]


SNAPSHOT = (
    "import sys, huggingface_hub\n"
    "huggingface_hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2])\n"
    "print(huggingface_hub.__version__)\n"
)
HUBS = {NEWEST: "2.", "hub-1": "1.33.", "hub-0_34": "0.34."}


@pytest.mark.parametrize(
    "version", [version if version == NEWEST else pytest.param(version, marks=pytest.mark.slow) for version in HUBS]
)
def test_https_with_an_authority_of_its_own(small, tmp_path, version):
    certificate, key = write_certificate(tmp_path)
    trusts = {"SSL_CERT_FILE": str(certificate), "REQUESTS_CA_BUNDLE": str(certificate)}
    command = [interpreter(version), "-c", SNAPSHOT, REPO]
    with running(small[0].server.settings.root, name=NAME, tls=TlsSettings(certificate, key)) as server:
        endpoint = f"https://127.0.0.1:{server.addresses.http}"
        done = run(endpoint, [*command, "model"], tmp_path, **trusts)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(HUBS[version])
        refused = run(endpoint, [*command, "nothing"], tmp_path)
        assert refused.returncode != 0
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stdout + refused.stderr
        url = f"{endpoint}/{REPO}/resolve/main/config.json"
        read = subprocess.run([*CURL, "--cacert", certificate, url], capture_output=True, check=True, timeout=60)
        assert read.stdout == FILES["config.json"]
    for path, content in FILES.items():
        assert (tmp_path / "model" / path).read_bytes() == content
    assert not (tmp_path / "nothing" / "config.json").exists()


CURL = ("curl", "--silent", "--show-error", "--fail")


@pytest.mark.parametrize("there", [0, 1, 5_000_000, len(FILES["model.safetensors"])])
@pytest.mark.parametrize("program", ["curl", "wget"])
def test_downloads_that_were_begun_are_continued(small, tmp_path, program, there):
    content = FILES["model.safetensors"]
    target = tmp_path / "model.safetensors"
    target.write_bytes(content[:there])
    url = f"http://127.0.0.1:{small[0].addresses.http}/{REPO}/resolve/main/model.safetensors"
    commands = {"curl": [*CURL, "-C", "-", "-o", target, url], "wget": ["wget", "-q", "-c", "-O", target, url]}
    done = subprocess.run(commands[program], capture_output=True, text=True, timeout=60, check=False)
    if there < len(content):
        assert done.returncode == 0, done.stderr
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("0-7", slice(0, 8)), ("4194300-4194310", slice(4194300, 4194311)), ("-9", slice(-9, None))],
)
def test_curl_reads_ranges(small, wanted, expected):
    url = f"http://127.0.0.1:{small[0].addresses.http}/{REPO}/resolve/main/model.safetensors"
    done = subprocess.run([*CURL, "-r", wanted, url], capture_output=True, timeout=60, check=True)
    assert done.stdout == FILES["model.safetensors"][expected]


def test_curl_resumes_a_cut_download(small, tmp_path):
    server, commit = small
    front = HttpFront(server.addresses.http)
    front.cuts, front.cut_after = 2, 2_000_000
    url = f"{front.url}/{REPO}/resolve/{commit}/model.safetensors"
    codes = []
    try:
        while 0 not in codes:
            assert len(codes) < 3
            codes.append(subprocess.run([*CURL, "-C", "-", "-o", "file", url], cwd=tmp_path, check=False).returncode)
    finally:
        front.stop()
    assert codes == [18, 18, 0], "curl calls a partial file 18"
    assert (tmp_path / "file").read_bytes() == FILES["model.safetensors"]
    starts = [int(wanted.removeprefix("bytes=").rstrip("-") or 0) for _, _, wanted in front.seen]
    assert 0 == starts[0] < starts[1] < starts[2], "each goes on where the one before was cut"


def test_up_prints_what_to_paste(tmp_path):
    files = make_folder(tmp_path / "source")
    manifest = write_manifest(tmp_path / "model.yaml", f"file://{files}", name="mine")
    with serving("up", "-f", manifest, "--volume", tmp_path / "volume", ready=tmp_path / "ready") as (child, _):
        found = re.search(r'export HF_ENDPOINT=(http://\S+) .*from_pretrained\("(\S+)"\)', child.output)
        assert found, child.output
        assert found[2] == "modelcache/mine", "the name of a folder that works in every program"
        done = run(found[1], ["hf", "download", found[2], "--local-dir", "here"], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for path in ("config.json", "model.safetensors"):
        assert (tmp_path / "here" / path).read_bytes() == SMALL[path]


# --- A revision that changes while a model is being loaded

REVISIONS = ("0", "1")
LOAD = (
    "import sys, hashlib\n"
    "from huggingface_hub import HfApi\n"
    "from transformers import AutoConfig, AutoModel\n"
    "repo, how = sys.argv[1:]\n"
    "options = {'revision': HfApi().model_info(repo).sha} if how == 'pinned' else {}\n"
    "model = AutoModel.from_pretrained(repo, **options)\n"
    "weight = model.embeddings.word_embeddings.weight.detach().numpy().tobytes()\n"
    "print('loaded', model.config.marker, hashlib.sha256(weight).hexdigest())\n"
)


@contextlib.contextmanager
def flipping(folder: Path, at: str) -> Iterator[tuple[HttpFront, dict[str, str]]]:
    """A tiny BERT whose main moves when `at` is first asked for; the weights' digests by the marker in the config."""
    weights = {}
    with hub_world(folder) as world:
        states = []
        for marker in REVISIONS:
            made = save_bert(folder / marker, BertFiles(config=dict(TINY), seed=int(marker)))
            config = json.loads((made / "config.json").read_text()) | {"marker": marker}
            states.append(
                {
                    "config.json": json.dumps(config).encode(),
                    "model.safetensors": (made / "model.safetensors").read_bytes(),
                }
            )
            tensor = load(states[-1]["model.safetensors"])["embeddings.word_embeddings.weight"]
            weights[marker] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        world.commit(states[0])
        world.fetch()
        with running(world.volume) as server:
            flipped = []

            def before(method: str, path: str) -> None:
                if at in path and not flipped:
                    flipped.append(path)
                    second = world.commit(states[1])
                    world.fetch()
                    url = f"/{REPO}/resolve/main/config.json"
                    wait_until(lambda: server.ask(url).headers["x-repo-commit"] == second, "main does not move")

            front = HttpFront(server.addresses.http, before=before)
            try:
                yield front, weights
            finally:
                front.stop()
            assert flipped, front.seen


@pytest.mark.parametrize(
    ("how", "at"), [("unpinned", "config.json"), ("unpinned", "model.safetensors"), ("pinned", "model.safetensors")]
)
def test_transformers_5_never_loads_a_mixed_model(tmp_path, how, at):
    with flipping(tmp_path, at) as (front, weights):
        done = run(front.url, [sys.executable, "-c", LOAD, REPO, how], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _, marker, digest = done.stdout.split()[-3:]
    assert (marker, digest) == ("0", weights["0"]), "it is the state that was there at the beginning, whole"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unpinned", "pinned"])
def test_transformers_4_is_whole_when_it_is_pinned_and_only_then(tmp_path, how):
    with flipping(tmp_path, "model.safetensors") as (front, weights):
        done = run(front.url, [interpreter("transformers-4_57"), "-c", LOAD, REPO, how], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _, marker, digest = done.stdout.split()[-3:]
    assert marker == "0"
    # That the other way does mix is why the docs say to pin.
    assert digest == weights["0" if how == "pinned" else "1"]


# --- Many pods


def test_a_hundred_pods_at_once_get_every_file(tmp_path):
    files = {f"model-{number:05}-of-00200.bin": random_bytes(4096, number) for number in range(200)}
    make_volume(tmp_path / "volume", files)
    pods = 100
    with running(tmp_path / "volume") as server:
        urls = [f"/org/name/resolve/main/{quote(path)}" for path in files]
        requests = [("GET", "/api/models/org/name"), ("GET", "/api/models/org/name/tree/main?recursive=true")]
        requests += [(method, url) for url in urls for method in ("HEAD", "GET")]
        listed = sum(len(server.ask(path).body) for _, path in requests[:2])
        load = ask_at_once(server.addresses.http, requests, clients=pods)
        assert load.statuses == {200: pods * len(requests)}
        assert load.received == pods * (listed + sum(map(len, files.values())))
        wait_until(lambda: server.metric("in_flight_bytes") == 0, "something is still being sent")
