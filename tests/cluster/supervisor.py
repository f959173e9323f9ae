"""Process 1 of a node: starts the node's components, reaps what they leave, and takes orders on a Unix socket.

It runs in namespaces of its own (processes, mounts, network, host name), so its death is the node's: the kernel then
kills every process of the node, pods included, and drops its mounts, links and loop devices. Nothing has to be tidied
up in the right order.

Run by `cluster.node`, standard library only: `supervisor.py STATE_FOLDER NODE_NAME LIFELINE_FD` (-1: no lifeline).
An order is one line of JSON, {"action": ..., ...}; so is its reply. "wait" is answered when the component has ended.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDER_SECONDS = 5.0


@dataclass
class Component:
    """A program of the node; `exit_code` is None while it runs, negative when a signal ended it."""

    pid: int
    exit_code: int | None = None
    waiting: list[socket.socket] = field(default_factory=list)


class OrderError(Exception):
    """An order that makes no sense now; its text is the reply."""


class Supervisor:
    """One thread, one loop: orders and deaths are handled one after the other, so no restart can race with an exit."""

    def __init__(self, state: Path, lifeline: int) -> None:
        self.state = state
        self.components: dict[str, Component] = {}
        self.selector = selectors.DefaultSelector()
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self.wake = (wake_read, wake_write)
        self.orders = socket.socket(socket.AF_UNIX)
        self.orders.bind(str(state / "control.sock"))
        self.orders.listen(64)
        self.selector.register(wake_read, selectors.EVENT_READ, self.reap)
        self.selector.register(self.orders, selectors.EVENT_READ, self.take_order)
        if lifeline >= 0:
            # The starter holds the other end. When it is gone, however it ended, this is readable and the node ends.
            self.selector.register(lifeline, selectors.EVENT_READ, lambda: sys.exit(0))

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                key.data()

    def reap(self) -> None:
        with suppress(BlockingIOError):
            while self.wake[0].recv(4096):
                pass
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.note_exit(*ended)

    def note_exit(self, pid: int, status: int) -> None:
        for component in self.components.values():
            if component.pid == pid and component.exit_code is None:
                component.exit_code = os.waitstatus_to_exitcode(status)
                for connection in component.waiting:
                    reply(connection, {"exit_code": component.exit_code})
                component.waiting.clear()

    def take_order(self) -> None:
        connection, _ = self.orders.accept()
        connection.settimeout(ORDER_SECONDS)
        try:
            order = json.loads(connection.makefile().readline())
            action = {"start": self.start, "signal": self.signal, "wait": self.wait, "list": self.list}[
                order.pop("action")
            ]
            answer = action(connection, **order)
        except (OSError, ValueError, KeyError, TypeError, OrderError) as error:
            answer = {"error": f"{error}" if isinstance(error, OrderError) else repr(error)}
        if answer is not None:
            reply(connection, answer)

    def start(self, _: socket.socket, name: str, argv: list[str]) -> dict[str, Any]:
        present = self.components.get(name)
        if present and present.exit_code is None:
            raise OrderError(f"{name} is running")
        log = str(self.state / "log" / f"{name}.log")
        pid = os.posix_spawnp(
            argv[0],
            argv,
            {**os.environ, "TMPDIR": "/var/tmp"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        self.components[name] = Component(pid)
        return {"pid": pid}

    def signal(self, _: socket.socket, name: str, signal_name: str) -> dict[str, Any]:
        component = self.component(name)
        if component.exit_code is None:  # not reaped yet, so the id is still its own
            os.kill(component.pid, signal.Signals[f"SIG{signal_name}"])
        return {"exit_code": component.exit_code}

    def wait(self, connection: socket.socket, name: str) -> dict[str, Any] | None:
        component = self.component(name)
        if component.exit_code is not None:
            return {"exit_code": component.exit_code}
        component.waiting.append(connection)
        return None

    def list(self, _: socket.socket) -> dict[str, Any]:
        return {name: {"pid": c.pid, "exit_code": c.exit_code} for name, c in self.components.items()}

    def component(self, name: str) -> Component:
        if name not in self.components:
            raise OrderError(f"no component {name} was started; there are {', '.join(self.components)}")
        return self.components[name]


def reply(connection: socket.socket, answer: dict[str, Any]) -> None:
    with connection, suppress(OSError):  # whoever asked may be gone
        connection.sendall(json.dumps(answer).encode() + b"\n")


def arrange_mounts(state: Path) -> None:
    """Gives the node its own /proc, /run and /var: neither the machine nor a neighbour sees what it writes there."""
    var = state / "var"
    for folder in ("lib", "log", "tmp", "cache"):
        (var / folder).mkdir(parents=True, exist_ok=True)
    (var / "run").symlink_to("/run")
    for command in (
        ["mount", "-t", "proc", "proc", "/proc"],
        ["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", "/run"],
        ["mount", "--bind", str(var), "/var"],
        ["mount", "--make-rshared", "/"],  # pods may ask for mount propagation
    ):
        subprocess.run(command, check=True)


def arrange_network() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    settings = {"ipv4/ip_forward": "1", "ipv4/conf/all/route_localnet": "1", "bridge/bridge-nf-call-iptables": "1"}
    for name, value in settings.items():
        path = Path("/proc/sys/net") / name
        if (
            path.exists()
        ):  # bridge/ is there only with br_netfilter; the cluster's own check of Services tells if it is missed
            path.write_text(value)


def main() -> None:
    state, node_name, lifeline = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    socket.sethostname(node_name)
    arrange_mounts(state)
    arrange_network()
    Supervisor(state, lifeline).run()


if __name__ == "__main__":
    main()
