"""For all tests: nobody's tokens and caches get in, and no program is left behind."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_PREFIXES = ("MODELCACHE_", "HF_", "HUGGING", "AWS_", "GOOGLE_", "CLOUDSDK_", "TRANSFORMERS_", "GRPC_")
# How tests/cluster is told which images to use.
_KEPT = {"MODELCACHE_IMAGE", "MODELCACHE_CLIENT_IMAGE", "MODELCACHE_BASE_IMAGE"}
_LOOPBACK = "localhost,127.0.0.1,::1"


@pytest.fixture(autouse=True, scope="session")
def _own_environment(tmp_path_factory) -> Iterator[None]:
    """The user's configuration would decide what a test sees; programs that tests start inherit this too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(_PREFIXES) and name not in _KEPT:
                patch.delenv(name)
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, ",".join(filter(None, [os.environ.get(name), _LOOPBACK])))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A run in the background of a shell ignores Ctrl-C, and its children would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", folder]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True, scope="session")
def _nothing_left_running() -> Iterator[None]:
    """Fails the run when a program that a test started outlives all of them."""
    yield
    left = {pid: command for pid in _children() if (command := _command(pid)) and "multiprocessing" not in command}
    assert left == {}, "still running"


def _children() -> list[str]:
    while True:
        lists = (task.joinpath("children").read_text(encoding="ascii") for task in Path("/proc/self/task").iterdir())
        try:
            return [pid for each in lists for pid in each.split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread ended meanwhile, and another one has its children


def _command(pid: str) -> str:
    """A living process's command line; "" for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
