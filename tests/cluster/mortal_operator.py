"""The operator as a process of this machine on a real cluster, behind a proxy that kills it at each of its writes.

Nothing else shows every point at which a process can die: between any two calls to the API server, with the write done
and its answer lost, or with the write never sent. The process has the rights of the operator's own account.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from cluster.machine import MachineCluster
from cluster.product import SYSTEM

When = Literal["before", "after"]
UNCOUNTED = ("/leases", "/events", "/selfsubjectaccessreviews")


@dataclass
class MortalOperator:
    """Dies at each write, and is started again by `keep_running`.

    Attributes:
        when: Whether it dies before the write has reached the API server, or after it was done, its answer unread.
        deaths: What it was about when it died, in order.
    """

    command: list[str]
    environment: dict[str, str]
    log: Path
    when: When
    deaths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    process: subprocess.Popen[bytes] | None = None
    writes: int = 0
    stopping: bool = False

    def dies_now(self, when: When, write: str) -> bool:
        """Told of each write; whether the process was killed at it."""
        with self.lock:
            if when == "before":
                self.writes += 1
            # Killed before the first write of its life, it would do the same again for ever.
            if when != self.when or (when == "before" and self.writes == 1) or self.process is None:
                return False
            self.process.kill()
            self.process.wait()
            self.deaths.append(write)
            return True

    def keep_running(self) -> None:
        while True:
            with self.lock:
                if self.stopping:
                    return
                self.writes = 0
                with self.log.open("a") as log:
                    self.process = subprocess.Popen(self.command, env=self.environment, stderr=log, stdout=log)
            self.process.wait()

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            if self.process is not None:
                self.process.kill()


class Handler(BaseHTTPRequestHandler):
    """Hands each request on, and the answer back as it comes: watches stay open."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        counts = self.command != "GET" and not any(part in path for part in UNCOUNTED)
        write = f"{self.command} {path}"
        if counts and self.server.operator.dies_now("before", write):
            return
        upstream = http.client.HTTPSConnection(*self.server.api, context=self.server.context, timeout=330)
        with contextlib.closing(upstream), contextlib.suppress(OSError):
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in {"host", "connection", "accept-encoding"}
            }
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            if counts and self.server.operator.dies_now("after", write):
                return
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() in {"content-type", "retry-after"}:
                    self.send_header(key, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while data := answer.read1(1 << 16):
                self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815 - names of http.server

    def log_message(self, *_: Any) -> None:
        """The API server has a log."""


class Proxy(ThreadingHTTPServer):
    """Listens where the cluster's node reaches this machine."""

    daemon_threads = True

    def __init__(self, address: str, api: tuple[str, int], operator: MortalOperator) -> None:
        super().__init__((address, 0), Handler)
        self.api = api
        self.context = ssl._create_unverified_context()
        self.operator = operator

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is what this is for."""


@contextmanager
def mortal_operator(
    cluster: MachineCluster, namespace: str, image: str, folder: Path, when: When
) -> Iterator[MortalOperator]:
    """Runs it for the ModelCaches of one namespace; the one of the chart must be away."""
    addresses = cluster.node.addresses
    kubeconfig, defaults = folder / "operator.conf", folder / "defaults.yaml"
    of_chart = cluster.kubectl.within(SYSTEM).get("configmap", "modelcache-defaults")
    defaults.write_text(of_chart["data"]["defaults.yaml"])
    environment = {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "MODELCACHE_DEFAULTS": str(defaults),
        "MODELCACHE_IMAGE": image,
        "MODELCACHE_NAMESPACES": namespace,
        "MODELCACHE_LEASE_NAME": "",
        "MODELCACHE_METRICS_PORT": "19091",
        "PYTHONWARNINGS": "ignore",
    }
    command = cluster.in_network([sys.executable, "-m", "modelcache_operator"])
    operator = MortalOperator(command, environment, folder / "operator.log", when)
    token = cluster.kubectl.within(SYSTEM)("create", "token", "modelcache", "--duration=1h").strip()
    with Proxy(addresses.host, (addresses.node, 6443), operator) as proxy:
        write_kubeconfig(kubeconfig, f"http://{addresses.host}:{proxy.server_port}", token)
        threads = [threading.Thread(target=run) for run in (proxy.serve_forever, operator.keep_running)]
        for thread in threads:
            thread.start()
        try:
            yield operator
        finally:
            operator.stop()
            proxy.shutdown()
            for thread in threads:
                thread.join()


def write_kubeconfig(path: Path, server: str, token: str) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": server}}],
        "users": [{"name": "operator", "user": {"token": token}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "operator"}}],
    }
    path.write_text(json.dumps(config))
