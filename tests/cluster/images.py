"""Builds the images that the tests run, without any image registry.

The base is made of Debian packages, the product's of its Dockerfile. Each is a docker-archive kept under the hash of
what it is made of. `MODELCACHE_BASE_IMAGE` names another base to pull instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.components import PAUSE_IMAGE
from cluster.node import ClusterError, exclusive
from cluster.programs import CONSIDERATELY, cache_root, cached, content_hash, kubernetes_programs

REPOSITORY = Path(__file__).parents[2]
BASE_PACKAGES = ("ca-certificates", "curl", "python3", "python3-venv")
# What a container never reads, a third of the base.
UNREAD = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
# As .dockerignore has it.
CONTEXT = (
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
    "crds",
    "operator",
    "weight_server",
    "sidecar",
    "Dockerfile",
)
TARGETS = {"runtime": "modelcache", "client": "modelcache-client"}
# Without times buildah never finds a layer again that it has built on the image.
EPOCH = "1970-01-01T00:00:00Z"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """An image's name in the cluster and the archive to load it from."""

    name: str
    archive: Path


def pause_image() -> Image:
    """The image that holds a pod's namespaces."""
    program = kubernetes_programs() / "pause"

    def make(new: Path) -> None:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.add(program, "pause", filter=plain)
        (new / "layer.tar").write_bytes(layer.getvalue())
        write_archive(
            new / "image.tar", PAUSE_IMAGE, new / "layer.tar", {"Entrypoint": ["/pause"], "User": "65535:65535"}
        )

    return Image(PAUSE_IMAGE, cached("images", f"pause-{content_hash([program])}", make) / "image.tar")


def base_image() -> Image:
    """Debian's minimal system with Python, of the release that this machine runs."""
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    key = f"base-{suite}-{content_hash([], *BASE_PACKAGES)}"
    name = f"localhost/python:{suite}-{content_hash([], *BASE_PACKAGES)}"

    def make(new: Path) -> None:
        layer = new / "layer.tar"
        exclude = [f"--dpkgopt=path-exclude={pattern}" for pattern in UNREAD]
        packages = f"--include={','.join(BASE_PACKAGES)}"
        run(
            *CONSIDERATELY,
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            packages,
            *exclude,
            suite,
            str(layer),
        )
        write_archive(new / "image.tar", name, layer, {"Env": [f"PATH={SEARCH_PATH}"], "Cmd": ["python3"]})
        layer.unlink()

    return Image(name, cached("images", key, make) / "image.tar")


def product_image(target: str) -> Image:
    """An image of the Dockerfile (`runtime` or `client`), of the work tree without what git ignores."""
    base = os.environ.get("MODELCACHE_BASE_IMAGE") or base_image()
    with tempfile.TemporaryDirectory() as folder:
        # Copied first: what is built is what was hashed, though somebody may be writing in the work tree.
        context = Path(folder)
        names = copy_context(context)
        key = content_hash(
            (context / name for name in names), *names, target, base if isinstance(base, str) else base.name
        )
        name = f"localhost/{TARGETS[target]}:{key}"

        def make(new: Path) -> None:
            with exclusive(cache_root() / ".buildah.lock"):  # one build at a time is slow enough
                build(context, target, base, name, new / "image.tar")

        made = cached("images", f"{target}-{key}", make)
    return Image(name, made / "image.tar")


def newer_image(image: Image) -> Image:
    """The same files with another label, and so another digest: a release in which little has changed."""
    name = f"{image.name}-newer"

    def make(new: Path) -> None:
        with tarfile.open(image.archive) as old, tarfile.open(new / "image.tar", "w") as archive:
            [manifest] = json.loads(content_of(old, "manifest.json"))
            config = json.loads(content_of(old, manifest["Config"]))
            config["config"]["Labels"] = {**(config["config"].get("Labels") or {}), "newer": "true"}
            changed = json.dumps(config).encode()
            rewritten = {manifest["Config"], "manifest.json", "repositories"}
            for member in old:
                if member.name not in rewritten:
                    archive.addfile(member, old.extractfile(member) if member.isfile() else None)
            manifest |= {"Config": f"{hashlib.sha256(changed).hexdigest()}.json", "RepoTags": [name]}
            add_file(archive, manifest["Config"], changed)
            add_file(archive, "manifest.json", json.dumps([manifest]).encode())

    return Image(name, cached("images", f"newer-{image.name.rpartition(':')[2]}", make) / "image.tar")


def content_of(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ClusterError(f"{name} is no file in {archive.name}")
    return file.read()


def copy_context(context: Path) -> list[str]:
    """Copies the files of the build into a folder; returns their names."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *CONTEXT],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    # A deleted file is listed until it is committed, one in conflict several times.
    names = [name for name in sorted(set(listed.stdout.split("\0"))) if (REPOSITORY / name).is_file()]
    for name in names:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, context / name)
    return names


def build(context: Path, target: str, base: Image | str, name: str, archive: Path) -> None:
    """Builds one target, with the machine's pip and TLS settings and the wheels of PIP_FIND_LINKS, into an archive."""
    if isinstance(base, Image):
        if base.name not in buildah("images", "--format={{.Name}}:{{.Tag}}").split():
            buildah("pull", "--quiet", f"docker-archive:{base.archive}")
        base = base.name
    arguments = {"PYTHON": base}
    volumes = {path: path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()}
    links = []
    for place in os.environ.get("PIP_FIND_LINKS", "").split():
        if Path(place).is_dir():
            inside = f"/wheels/{len(links)}"
            volumes[str(Path(place).resolve())] = inside
            links.append(inside)
        else:
            links.append(place)
    arguments["PIP_FIND_LINKS"] = " ".join(links)
    arguments["PIP_INDEX_URL"] = os.environ.get("PIP_INDEX_URL", "")
    buildah(
        *(
            "bud",
            "--quiet",
            "--isolation=chroot",
            "--layers",
            "--format=docker",
            f"--target={target}",
            f"--tag={TARGETS[target]}",
        ),
        *(f"--build-arg={key}={value}" for key, value in arguments.items() if value),
        *(f"--volume={outside}:{inside}:ro" for outside, inside in volumes.items()),
        str(context),
    )
    buildah("push", "--quiet", f"localhost/{TARGETS[target]}", f"docker-archive:{archive}:{name}")


def buildah(*arguments: str) -> str:
    """Runs buildah on a store of its own, in a mount namespace: its store keeps itself mounted otherwise."""
    store = cache_root() / "buildah"
    return run(
        *CONSIDERATELY,
        *("unshare", "--mount", "--propagation=private"),
        *("buildah", f"--root={store}/root", f"--runroot={store}/run", "--storage-driver=overlay"),
        *arguments,
    )


def run(*argv: str) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(argv)} failed:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout


def write_archive(path: Path, name: str, layer: Path, config: dict[str, object]) -> None:
    """Writes an image of one layer in the format of `docker save`."""
    with layer.open("rb") as file:
        layer_digest = hashlib.file_digest(file, "sha256").hexdigest()
    image = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
            "os": "linux",
            "config": config,
            "created": EPOCH,
            "history": [
                {"created": EPOCH, "created_by": "modelcache tests"}
            ],  # one entry for each layer, or buildah adds none to it
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(image).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        archive.add(layer, "layer.tar", filter=plain)
        add_file(archive, config_name, image)
        add_file(archive, "manifest.json", json.dumps(manifest).encode())


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owner and time say nothing about the content."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info
