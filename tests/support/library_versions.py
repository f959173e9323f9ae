"""Environments with other versions of libraries, made once and kept under build/library-versions."""

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from support.processes import REPOSITORY

LIST = Path(__file__).with_name("library_versions.toml")
HOME = REPOSITORY / "build" / "library-versions"
NEWEST = "newest"
_PIP_SECONDS = 280


def interpreter(name: str) -> str:
    """The Python of an environment, made if need be.

    Args:
        name: of a table in library_versions.toml; "newest" for the environment that runs the tests.
    """
    if name == NEWEST:
        return sys.executable
    wanted = tomllib.loads(LIST.read_text(encoding="utf-8"))[name]
    key = hashlib.sha256(json.dumps([wanted, sys.version, _lender()]).encode()).hexdigest()[:12]
    home = HOME / f"{name}-{key}"
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only a whole environment has the mark.
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
            (packages,) = home.glob("lib/python*/site-packages")
            install(name, packages)
            if wanted.get("borrows"):
                # Behind the environment's own packages on the path, so that those win.
                (packages / "borrowed.pth").write_text(f"{_lender()}\n", encoding="utf-8")
            (home / "complete").touch()
    return str(home / "bin" / "python")


def install(name: str, folder: Path, *options: str) -> None:
    """Put an environment's own packages into a folder, with further options of pip."""
    # The list is complete: a dependency that a new release adds must not change what is tested.
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        folder,
        *options,
        *tomllib.loads(LIST.read_text(encoding="utf-8"))[name]["packages"],
    ]
    subprocess.run(command, check=True, timeout=_PIP_SECONDS)


def _lender() -> str:
    """The folder of installed packages that has torch."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parents[1])
