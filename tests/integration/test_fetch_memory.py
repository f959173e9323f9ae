"""A fetch stays within 256 MiB, page cache included, whatever the size of the model."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

from modelcache_volume import Volume
from support.fake_hub import fake_hub
from support.fetching import safetensors_bytes
from support.processes import Child

LIMIT = 256 * 2**20
ROOTS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]


@contextlib.contextmanager
def memory_cgroup():
    """A cgroup (v1 or v2) limited to 256 MiB without swap; yields the file that processes enter it by."""
    root = next((root for root in ROOTS if (root / "cgroup.procs").exists()), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("needs the right to make cgroups")
    group = root / f"modelcache-test-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / "memory.limit_in_bytes"
        if not limit.exists():
            limit = group / "memory.max"
        if not limit.exists():
            pytest.skip("the memory controller is not enabled here")
        limit.write_text(str(LIMIT))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 4])
def test_768_mebibytes_pass_through_256(tmp_path, files):
    content = {
        f"model-{n}.safetensors": safetensors_bytes({"w": 768 * 2**20 // files}, fill=b"%d-" % n) for n in range(files)
    }
    with fake_hub(tmp_path / "hub") as hub, memory_cgroup() as processes:
        hub.commit("org/name", content)
        environment = {"MODELCACHE_SPEC": json.dumps({"repoId": "org/name", "endpoint": hub.url})}
        fetch = [sys.executable, "-m", "modelcache_fetcher", "fetch", "--volume", str(tmp_path / "v"), "--name", "m"]
        entering = ["sh", "-c", f'echo $$ > {processes}; exec "$@"', "sh", *fetch]
        with Child(entering, env=environment) as child:
            assert child.process.wait(200) == 0, child.output
    (snapshot,) = Volume.open(tmp_path / "v").snapshots()
    assert snapshot.verify() == []
