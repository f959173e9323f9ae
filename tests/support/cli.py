"""The `modelcache` command as users run it: a process, its exit code, and the sentences it prints."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelcache_api.load import load_manifest
from modelcache_fetcher import FetchResult, run_fetch
from modelcache_volume import Volume
from support.fetching import safetensors_bytes
from support.processes import Child

FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
SMALL: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": safetensors_bytes({"a": 5 * 2**20, "b": 3}),
    "README.md": b"# Model\n",
}


def make_folder(folder: Path, files: Mapping[str, bytes] = SMALL) -> Path:
    """A local source with these files and nothing else."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def write_manifest(file: Path, repo_id: str, *, name: str = "small", **spec: Any) -> Path:
    """A ModelCache manifest as JSON, which is YAML too."""
    content = {
        "apiVersion": "modelcache.io/v1alpha1",
        "kind": "ModelCache",
        "metadata": {"name": name},
        "spec": {"repoId": repo_id, **spec},
    }
    file.write_text(json.dumps(content, indent=1))
    return file


def fetch_here(manifest: Path, root: Path) -> FetchResult:
    """What `modelcache fetch` does, without a process of its own."""
    model = load_manifest(manifest)
    return run_fetch(model.spec, root, model.metadata.name)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Ask again and again until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds:g} s"
        time.sleep(0.02)


def run_cli(
    *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "modelcache_cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )


def refused(code: int, *arguments: str | Path, **how: Any) -> str:
    """Run a command that has to fail with this exit code, and give its sentences without the program's name.

    Every line on standard error must be a sentence of the program: no traceback, no warning.
    """
    done = run_cli(*arguments, **how)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("modelcache: ") for line in lines), done.stderr
    return "\n".join(line.removeprefix("modelcache: ") for line in lines)


@contextmanager
def serving(command: str, *arguments: str | Path, ready: Path) -> Iterator[tuple[Child, dict[str, str]]]:
    """`modelcache up` or `serve` on free ports, until the block is left; gives the process and its ready file."""
    with Child.module("modelcache_cli", command, *arguments, *FREE_PORTS, "--ready-file", ready) as child:
        child.wait_for("Ctrl-C stops it")
        yield child, json.loads(ready.read_text())


def state(root: Path) -> dict[str, Any]:
    """What readers of a volume see, whole or not: to be the same before and after a failure."""
    volume = Volume.open(root)
    snapshots = {snapshot.digest: [problem.what for problem in snapshot.verify()] for snapshot in volume.snapshots()}
    return {"snapshots": snapshots, "active": {a.name: (a.digest, a.generation) for a in volume.actives()}}
