"""A node seen from the machine: its namespaces, link, cgroups and supervisor; how it starts and leaves nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NODE_NAME = "node-0"
SUPERVISOR = Path(__file__).with_name("supervisor.py")


class ClusterError(Exception):
    """The cluster could not be started, stopped or used; the text says what to look at."""


def wait_until(what: str, seconds: float, condition: Callable[[], Any], *, pause: float = 0.1) -> Any:
    """The first truthy value of `condition`, asked each `pause` seconds; ClusterError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)
    return value


def state_root() -> Path:
    """The folder that has one folder for each cluster of this machine's user."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base).resolve() / "modelcache-clusters"


@dataclass(frozen=True)
class Addresses:
    """Addresses by a cluster's number. Pod and Service ranges are alike everywhere: no route leads out of a node."""

    number: int
    pods: str = "10.244.0.0/24"
    services: str = "10.96.0.0/16"
    api_service: str = "10.96.0.1"

    @property
    def link(self) -> str:
        return f"mcc{self.number}"

    @property
    def host(self) -> str:
        return f"10.89.{self.number}.1"

    @property
    def node(self) -> str:
        return f"10.89.{self.number}.2"


class Node:
    """A node by name. Its folder is all that is remembered, so any process can use or stop what another one started."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = state_root() / name

    @property
    def addresses(self) -> Addresses:
        return Addresses(int((self.state / "number").read_text()))

    @property
    def cgroup(self) -> str:
        return f"modelcache-{self.name}"

    def pid(self) -> int | None:
        """The supervisor's process id on this machine, None when it does not run."""
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            launcher = int((self.state / "launcher.pid").read_text())
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            command = Path(f"/proc/{launcher}/cmdline").read_bytes().split(b"\0")
            if children and str(self.state).encode() in command:  # else the id has been given to another process since
                return int(children[0])
        return None

    def enter(self, *, only_network: bool = False) -> list[str]:
        """The command that runs what follows it inside the node, or only in its network."""
        pid = self.pid()
        if pid is None:
            raise ClusterError(f"cluster {self.name} does not run")
        spaces = ["--net"] if only_network else ["--net", "--mount", "--pid", "--uts", "--ipc"]
        return ["nsenter", f"--target={pid}", *spaces, "--"]

    def start(self, *, lifeline: int | None) -> None:
        """Makes the namespaces and the link; no component runs yet. It ends when the other end of `lifeline` closes."""
        if str(self.state).startswith("/var/"):
            raise ClusterError(
                f"{self.state} is under /var, which a node has of its own; set XDG_STATE_HOME to another folder"
            )
        with exclusive(state_root() / ".lock"):  # two clusters started at once get two numbers
            if self.state.exists():
                self.stop()
            (self.state / "log").mkdir(parents=True)
            (self.state / "number").write_text(str(free_number()))
        make_cgroups(self.cgroup)
        inherited = [] if lifeline is None else [lifeline]
        with (self.state / "log/supervisor.log").open("ab") as log:
            launcher = subprocess.Popen(
                [
                    *(
                        "unshare",
                        "--mount",
                        "--propagation=private",
                        "--uts",
                        "--ipc",
                        "--net",
                        "--pid",
                        "--fork",
                        "--kill-child=SIGKILL",
                    ),
                    *(
                        sys.executable,
                        "-I",
                        str(SUPERVISOR),
                        str(self.state),
                        NODE_NAME,
                        str(-1 if lifeline is None else lifeline),
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=inherited,
                start_new_session=True,
            )
        (self.state / "launcher.pid").write_text(str(launcher.pid))
        launcher.returncode = 0  # it outlives this object on purpose; `stop` sees to its end
        wait_until(f"the supervisor of {self.name} (see {self.state}/log/supervisor.log)", 10, self.answers)
        self.connect_link()

    def answers(self) -> bool:
        try:
            self.order("list")
        except OSError:
            return False
        return True

    def connect_link(self) -> None:
        a, pid = self.addresses, str(self.pid())
        inside = [*self.enter(only_network=True), "ip"]
        for command in (
            ["ip", "link", "add", a.link, "type", "veth", "peer", "name", "eth0", "netns", pid],
            ["ip", "address", "add", f"{a.host}/24", "dev", a.link],
            ["ip", "link", "set", a.link, "up"],
            [*inside, "address", "add", f"{a.node}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [
                *inside,
                "route",
                "add",
                a.services,
                "dev",
                "eth0",
            ],  # kube-proxy rewrites the address only after a route was found
        ):
            subprocess.run(command, check=True)

    def stop(self) -> None:
        """Ends the node and removes all of it. Does nothing when there is none."""
        if not self.state.exists():
            return
        pid = self.pid()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # The kernel reaps a namespace's first process last of all.
            wait_until(f"the end of the processes of {self.name}", 60, lambda: ended(pid))
        wait_until(f"the end of the launcher of {self.name}", 10, self.launcher_reaped)
        wait_until(f"the loop devices of {self.name} to be free", 60, lambda: not self.loop_devices())
        wait_until(f"the cgroups {self.cgroup} to be empty", 30, lambda: remove_cgroups(self.cgroup))
        wait_until(
            f"the link of {self.name} to be gone", 10, lambda: not Path("/sys/class/net", self.addresses.link).exists()
        )
        shutil.rmtree(self.state)

    def launcher_reaped(self) -> bool:
        """Whether the launcher has ended; takes its exit code when it is a child of this process."""
        try:
            launcher = int((self.state / "launcher.pid").read_text())
            return os.waitpid(launcher, os.WNOHANG)[0] == launcher
        except (FileNotFoundError, ValueError, ChildProcessError):
            return True

    def loop_devices(self) -> list[str]:
        """The loop devices on images of this node's volumes."""
        listed = subprocess.run(
            ["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"],
            check=True,
            capture_output=True,
            text=True,
        )
        return [line.split()[0] for line in listed.stdout.splitlines() if str(self.state) + "/" in line]

    def order(self, action: str, *, timeout: float = 5, **arguments: Any) -> dict[str, Any]:
        """The supervisor's reply to one order; OSError when it does not answer within `timeout` seconds."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.state / "control.sock"))
            connection.sendall(json.dumps({"action": action, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile().readline() or '{"error": "the node ended"}')
        if error := answer.get("error"):
            raise ClusterError(f"{action} in {self.name}: {error}")
        return answer


def ended(pid: int) -> bool:
    """Whether a process is gone or only waits for its parent to notice."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """One process at a time, by a lock on a file that is made when it is not there."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def free_number() -> int:
    """The smallest number whose addresses nobody has on this machine."""
    taken = {int(path.read_text()) for path in state_root().glob("*/number")}
    listed = json.loads(subprocess.run(["ip", "-json", "address"], check=True, capture_output=True).stdout)
    present = {address["local"] for link in listed for address in link.get("addr_info", []) if "local" in address}
    for number in range(1, 255):
        if number not in taken and Addresses(number).host not in present:
            return number
    raise ClusterError(f"254 clusters are there already; see {state_root()}")


def cgroup_hierarchies() -> list[Path]:
    """Where cgroups are mounted: one place for version 2, one for each controller of version 1, or both."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(mount[1]) for mount in mounts if mount[2] in {"cgroup", "cgroup2"}]


def make_cgroups(name: str) -> None:
    """A kubelet removes pods it does not know below its root, so each gets a root of its own."""
    for hierarchy in cgroup_hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)


def remove_cgroups(name: str) -> bool:
    """Whether all are gone; some may stay busy for a moment after their last process."""
    done = True
    for hierarchy in cgroup_hierarchies():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:
                done = False
    return done
