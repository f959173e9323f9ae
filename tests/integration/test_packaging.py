"""What is committed installs, builds and runs elsewhere: nothing is missing, nothing of this machine is in it."""

import ast
import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from support.processes import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [Path(package) for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
SCRIPTS = PROJECT["project"]["scripts"]
# What the client's pods get: no Kubernetes, no cloud package, no torch.
CLIENT_NEEDS = {"modelcache", "grpcio", "protobuf", "crc32c", "typing_extensions"}
CLIENT_ROOTS = {"modelcache", "modelcache_wire", "modelcache_volume", "grpc", "google", "crc32c", "typing_extensions"}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Runs a program; its output, also in the error if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def sources() -> list[Path]:
    """All files of the repository but ignored ones: what a commit of everything would hold."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
    return [path for name in listed.split("\0") if name and (REPOSITORY / (path := Path(name))).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy of the sources, without what was built from them."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in sources():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> Path:
    """The folder with the sdist and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> set[str]:
    """Names in the wheel."""
    return set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())


@pytest.fixture(scope="module")
def client_python(checkout, tmp_path_factory) -> Path:
    """The Python of an environment into which the checkout was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", checkout / "constraints.txt", checkout, cwd=folder)
    return python


def package_files() -> set[str]:
    """Names in the wheel of all that belongs to the packages."""
    files = [path for path in sources() if path.suffix in {".py", ".pyi", ".proto"} or path.name == "py.typed"]
    return {
        path.relative_to(package.parent).as_posix()
        for path in files
        for package in PACKAGES
        if path.is_relative_to(package)
    }


def test_an_empty_environment_gets_the_client_and_only_what_it_needs(client_python):
    listed = json.loads(run(client_python, "-m", "pip", "list", "--format", "json", cwd=client_python.parent))
    assert {entry["name"] for entry in listed} - {"pip", "setuptools"} == CLIENT_NEEDS


def test_importing_the_client_loads_nothing_heavy_and_nothing_of_the_servers_side(client_python):
    code = """
import sys
before = set(sys.modules)
import modelcache
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(name for name in new if not name.startswith("_") and not name.startswith("cython_runtime")))
"""
    loaded = set(run(client_python, "-I", "-c", code, cwd=client_python.parent).split())
    assert "modelcache" in loaded
    assert loaded <= CLIENT_ROOTS


def test_what_needs_no_torch_works_without_it(client_python):
    code = "from modelcache import snapshot; from modelcache_wire.v1 import weights_pb2_grpc; import modelcache_volume"
    run(client_python, "-I", "-W", "error", "-c", code, cwd=client_python.parent)


def test_the_client_names_nothing_of_google_but_protobuf():
    """import-linter cannot say so: `google` is one package to it."""
    imported = set()
    for path in (REPOSITORY / "sidecar").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    google = {name for name in imported if name.startswith("google")}
    assert all(name.startswith("google.protobuf") for name in google), google


def test_every_package_is_named_for_the_wheel():
    found = {path.parent for path in sources() if path.match("*/modelcache*/__init__.py") and path.parts[0] != "tests"}
    assert {package for package in found if len(package.parts) == 2} == set(PACKAGES)


def test_the_wheel_has_all_of_the_packages_and_nothing_else(wheel):
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= wheel
    assert {name for name in wheel if name.endswith(".proto")} == {
        "modelcache_volume/v1/manifest.proto",
        "modelcache_wire/v1/weights.proto",
    }
    assert package_files() - wheel == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    tops = {name.partition("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {package.name for package in PACKAGES}
    assert not [name for name in wheel if "__pycache__" in name]


def test_the_sdist_has_the_sources_and_no_leftovers(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.as_posix() for path in sources() if path.parts[0] not in {".ci", "tests", "docs"}} - {".gitignore"}
    assert expected - names == set()
    leftovers = {"build", "dist", ".venv", ".git", ".ci"}
    assert not [name for name in names if name.partition("/")[0] in leftovers or "__pycache__" in name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_command_of_the_wheel_explains_itself(script, built, tmp_path):
    target = tmp_path / "installed"
    wheel = next(built.glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    points = configparser.ConfigParser()
    points.read(next(target.glob("*.dist-info/entry_points.txt")), encoding="utf-8")
    module, _, function = points["console_scripts"][script].partition(":")
    code = f"""
import sys
from {module} import {function} as command
assert sys.modules[{module!r}].__file__.startswith({str(target)!r}), sys.modules[{module!r}].__file__
sys.argv = [{script!r}, "--help"]
sys.exit(command())
"""
    printed = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(target), "COLUMNS": "100"})
    assert printed.lower().startswith("usage:")
    assert script in printed


def test_constraints_pin_versions_and_name_no_place():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.!]+", line)] == []


def test_the_constraints_cover_what_this_environment_runs_with():
    """Whatever the tests pass with is what others install."""
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line.partition("==")[2]
        for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    listed = json.loads(run(sys.executable, "-m", "pip", "list", "--format", "json", cwd=REPOSITORY))
    installed = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"].partition("+")[0] for entry in listed}
    # Some are only of extras that need not be installed here.
    here = pinned.keys() & installed.keys()
    assert {name: installed[name] for name in here} == {name: pinned[name] for name in here}


def test_nothing_committed_names_this_machine_or_a_package_index():
    own = [str(REPOSITORY) + "/"] if len(REPOSITORY.parts) > 2 else []
    wanted = re.compile(
        "|".join(
            [
                *map(re.escape, own),
                r"/(?:home|Users)/(?!(?:me|you|user)/)[a-z][\w.-]*/",
                r"(?<![\w.])/root/",
                r"/opt/[w]heels",
                r"python[h]osted",
                r"(?:extra-)?index-[u]rl",
                r"trusted-[h]ost",
                r"https?://[^\s\"']+/[s]imple\b",
            ]
        )
    )
    found = []
    for path in sources():
        text = (REPOSITORY / path).read_bytes().decode("utf-8", "replace")
        if path != Path(__file__).relative_to(REPOSITORY):
            found += [f"{path}:{text.count(chr(10), 0, hit.start()) + 1}: {hit[0]}" for hit in wanted.finditer(text)]
    assert found == []
