"""The volume's hub/ folder is a Hugging Face cache: their programs read it offline, without a change."""

import json
import os
import subprocess
import sys

import pytest

from modelcache_volume import Volume
from support.volumes import publish

COMMIT = "c" * 40
FILES = {"config.json": b'{"a": 1}', "sub/vocab.txt": b"x\ny\n", "empty.txt": b""}

PROGRAM = """
import json, os, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
found = {}
for revision in ("main", "refs/pr/1", sys.argv[1], None):
    for path in ("config.json", "sub/vocab.txt", "empty.txt"):
        file = hf_hub_download("org/name", path, revision=revision, local_files_only=True)
        found[f"{revision} {path}"] = open(file, "rb").read().decode()
    folder = snapshot_download("org/name", revision=revision, local_files_only=True)
    found[f"{revision} folder"] = sorted(os.listdir(folder))
info = scan_cache_dir()
found["repos"] = [[repo.repo_id, repo.size_on_disk, repo.nb_files] for repo in info.repos]
found["refs"] = sorted(ref for repo in info.repos for revision in repo.revisions for ref in revision.refs)
found["commits"] = sorted(revision.commit_hash for repo in info.repos for revision in repo.revisions)
found["warnings"] = [str(warning) for warning in info.warnings if "models--" in str(warning)]
print(json.dumps(found))
"""


@pytest.fixture
def volume(tmp_path):
    volume = Volume.create(tmp_path / "volume")
    with volume.lock() as writer:
        publish(writer, {"config.json": b"old"}, commit="d" * 40)
        writer.activate("bert", publish(writer, FILES, commit=COMMIT), requested="main")
        publish(writer, FILES, commit=COMMIT, requested="refs/pr/1")
        publish(writer, FILES, repo_id="s3://bucket", requested="")
    return volume


def run(volume, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HUB_CACHE": str(volume.layout.hub), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, COMMIT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_huggingface_hub_reads_the_volume_offline(volume, tmp_path):
    found = run(volume, tmp_path)
    for revision in ("main", "refs/pr/1", COMMIT, None):
        assert {path: found[f"{revision} {path}"].encode() for path in FILES} == FILES
        assert found[f"{revision} folder"] == ["config.json", "empty.txt", "sub"]
    assert found["repos"] == [["org/name", sum(map(len, FILES.values())) + 3, 4]]
    assert found["refs"] == ["main", "refs/pr/1"]
    assert found["commits"] == [COMMIT, "d" * 40]
    assert found["warnings"] == []


def test_it_still_does_after_pruning(volume, tmp_path):
    with volume.lock() as writer:
        writer.prune()
    found = run(volume, tmp_path)
    assert found["commits"] == [COMMIT]
    assert found["refs"] == ["main", "refs/pr/1"]
