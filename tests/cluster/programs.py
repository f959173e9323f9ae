"""Builds the cluster's programs from Go modules, once: they are kept outside the work tree by their sources' hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.node import ClusterError, exclusive

KEPT = 3
SOURCE = Path(__file__).with_name("kubernetes")
KUBERNETES_VERSION = "v1.34.4"  # as go.mod has it
HELM = "helm.sh/helm/v4/cmd/helm@v4.3.1"
NAMES = (
    "coredns",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "volume-provisioner",
)
# Builds take minutes of every core they get; tests that run beside them have deadlines. A build ends with its starter.
CONSIDERATELY = ("setpriv", "--pdeathsig=TERM", "nice", "-n", "19")


def cache_root() -> Path:
    """The folder of everything built; it may be deleted whenever no cluster runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "modelcache-clusters"


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder KIND/KEY of the cache, made by `make` (which gets an empty folder to fill) if it is not there.

    A KEY is NAME-HASH. One process makes it, others wait; the latest `KEPT` of each NAME stay.
    """
    place = cache_root() / kind / key
    if place.exists():
        return place
    name = key.rpartition("-")[0]
    with exclusive(place.parent / f".{name}.lock"):
        if not place.exists():
            new = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
            try:
                make(new)
                new.chmod(0o755)
                new.rename(place)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            alike = place.parent.glob(f"{name}-????????????")
            for old in sorted(alike, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
                shutil.rmtree(old)
    return place


def content_hash(paths: Iterable[Path], *more: str) -> str:
    """12 hex digits that change with the names and bytes of files and with `more`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {path.stat().st_size}\0".encode() + path.read_bytes())
    digest.update("\0".join(more).encode())
    return digest.hexdigest()[:12]


def kubernetes_programs() -> Path:
    """A folder with every program of NAMES and `pause`."""
    flags = build_flags()
    sources = [path for path in SOURCE.rglob("*") if path.is_file()]
    return cached("programs", f"kubernetes-{content_hash(sources, *flags)}", lambda new: build_kubernetes(new, flags))


def build_flags() -> list[str]:
    """Flags of `go build`: programs without debug tables, which say the version that they are of."""
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    stamp = {
        "gitVersion": KUBERNETES_VERSION,
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
    }
    variables = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamp.items())
    return ["-trimpath", "-ldflags", f"-s -w {variables}"]


def build_kubernetes(new: Path, flags: list[str]) -> None:
    go("build", *flags, "-o", str(new / "kubernetes"), ".")
    go("build", "-trimpath", "-ldflags", "-s -w", "-o", str(new / "pause"), "./pause")
    for name in NAMES:
        (new / name).symlink_to("kubernetes")


def helm() -> Path:
    """The helm program."""
    key = f"helm-{content_hash([], HELM)}"
    return cached("helm", key, lambda new: go("install", "-trimpath", "-ldflags=-s -w", HELM, bin_folder=new)) / "helm"


def go(*arguments: str, bin_folder: Path | None = None) -> None:
    if shutil.which("go") is None:
        raise ClusterError("the test cluster is built from Go modules: install Go 1.25 or later, and put `go` on PATH")
    environment = {**os.environ, "CGO_ENABLED": "0", **({"GOBIN": str(bin_folder)} if bin_folder else {})}
    subprocess.run([*CONSIDERATELY, "go", *arguments], cwd=SOURCE, env=environment, check=True)
