"""The cluster on this machine: started from nothing, broken by component, removed without a trace."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import components
from cluster.images import Image, base_image, pause_image
from cluster.kubectl import Kubectl, has_condition
from cluster.node import NODE_NAME, Addresses, ClusterError, Node, wait_until
from cluster.pki import make_pki
from cluster.programs import kubernetes_programs

READY_SECONDS = 150


class MachineCluster:
    """A single-node Kubernetes by name; any process can use or stop what another one started."""

    def __init__(self, name: str = "test") -> None:
        if not name.replace("-", "").isalnum() or len(name) > 40:
            raise ClusterError(f"a cluster's name has letters, digits and dashes, at most 40: {name!r}")
        self.name = name
        self.node = Node(name)
        self.kubeconfig = self.node.state / "pki/admin.conf"

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(kubernetes_programs() / "kubectl", self.kubeconfig)

    @property
    def logs(self) -> Path:
        """The folder with one log for each component, and the containers' own below pods/."""
        return self.node.state / "log"

    def running(self) -> bool:
        return self.node.pid() is not None

    def start(self, *, lifeline: int | None = None) -> None:
        """Starts a new cluster, in place of one of the same name; returns when pods can run and names resolve.

        With `lifeline`, the read end of a pipe, the cluster ends by itself when the other end closes. When the start
        fails, the logs are kept (it prints where) and nothing else.
        """
        programs, pause = kubernetes_programs(), pause_image()
        self.node.start(lifeline=lifeline)
        try:
            self.configure(components.Paths(self.node.state, programs))
            for name in ("etcd", "containerd", "kube-apiserver"):
                self.launch(name)
            self.await_component("containerd")
            self.load(pause)
            self.await_component("kube-apiserver")
            others = [name for name in components.ORDER if name not in {"etcd", "containerd", "kube-apiserver"}]
            for name in others:
                self.launch(name)
            self.kubectl.apply(*components.storage_classes())
            for name in others:
                self.await_component(name)
            self.await_ready()
        except BaseException:
            kept = self.keep_logs()
            self.stop()
            print(f"The cluster {self.name} did not start; its logs are in {kept}")
            raise

    def configure(self, paths: components.Paths) -> None:
        addresses = self.node.addresses
        make_pki(paths.pki, addresses)
        paths.volumes.mkdir()
        for name, text in components.files(paths, addresses, self.node.cgroup).items():
            file = paths.config / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        commands = components.commands(paths, addresses)
        (paths.config / "commands.json").write_text(json.dumps(commands, indent=2))
        for name in ("containers", "pods"):
            (self.node.state / "var/log" / name).mkdir(exist_ok=True)
        (self.logs / "pods").symlink_to("../var/log/pods")

    def await_ready(self) -> None:
        """Waits until the node takes pods and a namespace is complete."""
        self.kubectl.wait_for("node", NODE_NAME, has_condition("Ready"), seconds=READY_SECONDS)
        self.kubectl.within("default").wait_for("serviceaccount", "default", lambda _: True, seconds=READY_SECONDS)

    def stop(self) -> None:
        """Ends the cluster and removes all of it; nothing to do is no error."""
        self.node.stop()

    def keep_logs(self, folder: Path | None = None) -> Path:
        """Copies the logs out of the cluster's own folder, which `stop` removes."""
        folder = folder or Path("build/cluster-logs").absolute() / f"{self.name}-{time.strftime('%H%M%S')}"
        shutil.copytree(self.logs, folder, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        return folder

    # --- components

    def launch(self, name: str) -> None:
        """Starts a component that does not run, without waiting for it to be ready."""
        commands = json.loads((self.node.state / "config/commands.json").read_text())
        if name not in commands:
            raise ClusterError(f"there is no component {name}; there are {', '.join(commands)}")
        self.node.order("start", name=name, argv=commands[name])

    def start_component(self, name: str) -> None:
        """Starts a component that does not run and waits until it is ready."""
        self.launch(name)
        self.await_component(name)

    def stop_component(self, name: str, *, seconds: float = 15) -> None:
        """Ends a component as a shutdown does, and with SIGKILL when that takes longer than `seconds`."""
        self.node.order("signal", name=name, signal_name="TERM")
        try:
            self.node.order("wait", name=name, timeout=seconds)
        except TimeoutError:
            self.kill_component(name)

    def kill_component(self, name: str) -> None:
        """Ends a component at once (SIGKILL), frozen or not, and returns when it is gone."""
        self.node.order("signal", name=name, signal_name="KILL")
        self.node.order("wait", name=name, timeout=30)

    def restart_component(self, name: str) -> None:
        """Stops a component, starts it again and waits until it is ready."""
        self.stop_component(name)
        self.start_component(name)

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """The component does not run within; afterwards it is ready again."""
        self.stop_component(name)
        try:
            yield
        finally:
            self.start_component(name)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The component stands still within (SIGSTOP): its connections stay open and nobody answers."""
        self.node.order("signal", name=name, signal_name="STOP")
        try:
            yield
        finally:
            self.node.order("signal", name=name, signal_name="CONT")
            self.await_component(name)

    def await_component(self, name: str) -> None:
        """Waits until a component does its work; ClusterError with the end of its log if it ends or takes too long."""
        healthy = health_checks(self.node)[name]

        def ready() -> bool:
            exit_code = self.node.order("list")[name]["exit_code"]
            if exit_code is not None:
                raise ClusterError(f"{name} ended with exit code {exit_code}:\n{self.log_tail(name)}")
            with suppress(OSError):
                return healthy()
            return False

        try:
            wait_until(f"{name} is ready", READY_SECONDS, ready)
        except ClusterError as late:
            raise ClusterError(f"{late}\n{self.log_tail(name)}") from late

    def log_tail(self, name: str, lines: int = 20) -> str:
        return "\n".join((self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])

    # --- images and network

    def load(self, image: Image) -> None:
        """Gives the node an image, if it does not have it."""
        if image.name not in self.images("list", "--quiet").split():
            self.images("import", str(image.archive))

    def tag(self, image: str, name: str) -> None:
        """Gives an image that the node has another name beside its own."""
        self.images("tag", image, name)

    def images(self, *arguments: str) -> str:
        """What the node's `ctr images` printed."""
        ctr = [*self.node.enter(), "ctr", f"--address={components.CONTAINERD_SOCKET}", "--namespace=k8s.io", "images"]
        return subprocess.run([*ctr, *arguments], check=True, capture_output=True, text=True).stdout

    def load_base(self) -> str:
        """Loads the image with Python and a shell that the product's are built on; returns its name."""
        image = base_image()
        self.load(image)
        return image.name

    def in_network(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in the cluster's network: addresses of pods and Services work, nothing else."""
        return [*self.node.enter(only_network=True), *argv]


def health_checks(node: Node) -> dict[str, Callable[[], bool]]:
    """What tells for each component that it does its work; an OSError means no."""
    address = node.addresses.node

    def answers(url: str) -> Callable[[], bool]:
        return lambda: bool(urllib.request.urlopen(url, timeout=2, context=context).status == 200)

    context = ssl._create_unverified_context()  # each component signs its own
    socket_in_node = Path(f"/proc/{node.pid()}/root{components.CONTAINERD_SOCKET}")
    return {
        "etcd": lambda: True,  # the API server is not ready without it
        "kube-apiserver": answers(f"https://{address}:6443/readyz"),
        "containerd": lambda: connects(socket_in_node),
        "kube-controller-manager": answers(f"https://{address}:10257/healthz"),
        "kube-scheduler": answers(f"https://{address}:10259/healthz"),
        "kubelet": answers(f"http://{address}:10248/healthz"),
        "kube-proxy": answers(f"http://{address}:10256/healthz"),
        "coredns": lambda: resolves(node.addresses, "kubernetes.default.svc.cluster.local"),
        "volume-provisioner": lambda: True,  # a claim waits for it
    }


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
    return True


def resolves(addresses: Addresses, name: str) -> bool:
    """Whether the cluster's DNS has an address for a name (RFC 1035, one question of type A)."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    query = struct.pack(">6H", 1, 0x0100, 1, 0, 0, 0) + question + b"\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(1)
        connection.connect((addresses.node, 53))
        connection.send(query)
        _, flags, _, answers, _, _ = struct.unpack(">6H", connection.recv(512)[:12])
    return flags & 0xF == 0 and answers > 0
