"""huggingface_hub, old and new, reads from the weight server as from the Hub: same files, same errors."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcache_server import TokenSettings
from modelcache_volume import BLOCK_BYTES, Volume
from support.hub_world import NAME, REPO, git_oid, hub_files, hub_world
from support.library_versions import NEWEST, interpreter
from support.processes import TESTS
from support.proxies import HttpFront
from support.server_security import AUDIENCE, ISSUER, Issuer
from support.server_volume import flip_bit, make_volume, running

OLD, NEW = hub_files(1), hub_files(2)
TAG = "v2.0"
LFS = (".safetensors", ".onnx")
VERSIONS = [
    pytest.param(NEWEST, "2."),
    pytest.param("hub-1", "1.33", marks=pytest.mark.slow),
    pytest.param("hub-0_34", "0.34", marks=pytest.mark.slow),
]


def described(files: dict[str, bytes]) -> dict[str, dict[str, object]]:
    found = {}
    for path, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        etag = sha256 if path.endswith(LFS) else git_oid(content)
        found[path] = {"size": len(content), "sha256": sha256, "etag": etag}
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model whose tag is asked for, with an earlier revision kept; one server open to all, one behind tokens."""
    folder = tmp_path_factory.mktemp("clients")
    issuer = Issuer()
    issuer.add_ec("key")
    tokens = TokenSettings(issuer.publish(folder / "jwks.json"), ISSUER, AUDIENCE, ("default/reader",))
    with hub_world(folder) as world:
        # Its file host has another name, as the real one's: 1.33 follows redirects within a host by itself.
        world.hub.cdn.url = world.hub.cdn.url.replace("127.0.0.1", "localhost")
        previous = world.commit(OLD)
        world.fetch()
        active = world.commit(NEW)
        world.hub.repos[REPO].tags[TAG] = active
        world.fetch(TAG)
        shutil.copytree(world.volume, folder / "damaged", symlinks=True)
        _damage(folder / "damaged", "model.safetensors", active)
        bucket = {"model.safetensors": NEW["model.safetensors"], "onnx/model.onnx": NEW["onnx/model.onnx"]}
        make_volume(folder / "bucket", bucket, name="bert", repo_id="s3://models/bert", requested="", commit="b" * 40)
        with (
            running(world.volume, name=NAME) as server,
            running(world.volume, name=NAME, tokens=tokens) as guarded,
            running(folder / "damaged", name=NAME, warmup_bytes=0) as damaged,
            running(folder / "bucket") as of_bucket,
            _front(server.addresses.http) as cutter,
        ):
            endpoint = f"http://127.0.0.1:{server.addresses.http}"
            told = {
                "repo": REPO,
                "active": active,
                "previous": previous,
                "tag": TAG,
                "names": ["main", TAG, active, active[:7], active[:20]],
                "files": described(NEW),
                "old_files": described(OLD),
                "parameters": 3 * BLOCK_BYTES + 12345 + 64,
                "upstream": world.hub.url,
                "guarded": f"http://127.0.0.1:{guarded.addresses.http}",
                "cutting": cutter.url,
                "bucket": f"http://127.0.0.1:{of_bucket.addresses.http}",
                "bucket_files": described(bucket),
                "corrupt": f"http://127.0.0.1:{damaged.addresses.http}",
                "allowed": issuer.token(),
                "denied": issuer.token("batch/job"),
                "expired": issuer.token(seconds=-60),
            }
            file = folder / "world.json"
            file.write_text(json.dumps(told))
            yield endpoint, file, cutter


@contextlib.contextmanager
def _front(port: int) -> Iterator[HttpFront]:
    front = HttpFront(port)
    try:
        yield front
    finally:
        front.stop()


def _damage(root: Path, path: str, commit: str) -> None:
    """Flip a bit in the file's second block."""
    for snapshot in Volume.open(root).snapshots():
        if snapshot.manifest.source.commit == commit:
            flip_bit(snapshot.blob_path(snapshot.file(path)), BLOCK_BYTES + 7)


@pytest.mark.parametrize(("version", "begins"), VERSIONS)
def test_every_way_of_reading_works(world, version, begins, tmp_path):
    endpoint, told, cutter = world
    # They keep what they got in pieces of 10 MiB.
    cutter.cuts, cutter.cut_after = 1, 11 * 2**20
    cutter.seen.clear()
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "default"}
    command = [interpreter(version), str(TESTS / "support" / "hub_checks.py"), str(told)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failures = [f"--- {line['check']}\n{line['failure']}" for line in lines if line.get("failure")]
    assert not failures, "\n".join(failures)
    assert lines, done.stderr
    assert lines[-1]["version"].startswith(begins), done.stderr[-2000:]
    assert len(lines) > 50
    assert cutter.cuts == 0
    ranges = [
        wanted for method, path, wanted in cutter.seen if (method, path.endswith("/model.safetensors")) == ("GET", True)
    ]
    assert len(ranges) == 2, "it was cut once"
    if version != "hub-0_34":
        assert ranges[1].startswith("bytes=10485760-"), "it goes on where it was cut"
