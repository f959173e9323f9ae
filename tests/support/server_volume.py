"""Volumes with random files, and real servers over them, for the server's tests."""

import contextlib
import http.client
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from modelcache_server import Addresses, Server, ServerSettings
from modelcache_volume import Snapshot, Volume
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
from support.volumes import publish

MIB = 1 << 20
HOST = "127.0.0.1"


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def wait_until(condition: Callable[[], object], complaint: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def make_volume(
    root: Path, files: dict[str, bytes], *, name: str = "m", activate: bool = True, **source: str
) -> tuple[Volume, Snapshot]:
    """A volume (new or not) with one more published snapshot, active under `name`."""
    volume = Volume.create(root)
    with volume.lock(wait=10) as writer:
        snapshot = publish(writer, files, **source)
        if activate:
            writer.activate(name, snapshot, requested=source.get("requested", "main"))
    return volume, snapshot


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def metrics_of(status_port: int) -> str:
    """What Prometheus is told."""
    connection = http.client.HTTPConnection(HOST, status_port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def metric_of(status_port: int, name: str) -> float:
    """The value of the metric's line that begins so."""
    for line in metrics_of(status_port).splitlines():
        if line.startswith(f"modelcache_server_{name}"):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Running:
    """A started server and what a client needs to talk to it."""

    server: Server
    addresses: Addresses
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, path: str, *, method: str = "GET", port: int | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(HOST, port or self.addresses.http, timeout=30)
        try:
            sent = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, path, headers={**self.headers, **sent})
            response = connection.getresponse()
            names = {key.lower(): value for key, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def file(self, digest: str, path: str, **headers: str) -> Answer:
        return self.ask(f"/v1/snapshots/{digest}/{path}", **headers)

    def status(self, path: str) -> Answer:
        return self.ask(path, port=self.addresses.status)

    def metric(self, name: str) -> float:
        return metric_of(self.addresses.status, name)

    @contextlib.contextmanager
    def stub(self) -> Iterator[weights_pb2_grpc.WeightsStub]:
        with grpc.insecure_channel(f"{HOST}:{self.addresses.grpc}") as channel:
            yield weights_pb2_grpc.WeightsStub(channel)


@contextlib.contextmanager
def running(root: Path, *, ready: bool = True, grace: float = 5.0, **settings: object) -> Iterator[Running]:
    """A server in this process, on free ports."""
    chosen = {"cache_bytes": 64 * MIB, "poll_seconds": 0.05, "lease_holder": "test", **settings}
    server = Server(ServerSettings(root=root, host=HOST, grpc_port=0, http_port=0, status_port=0, **chosen))
    addresses = server.start()
    try:
        if ready:
            assert server.wait_ready(30), server.problem
        yield Running(server, addresses)
    finally:
        server.stop(grace)


def read_all(
    stub: weights_pb2_grpc.WeightsStub, digest: str, *ranges: tuple[str, int, int], timeout: float = 30, **options: int
) -> bytes:
    wanted = [weights_pb2.Range(path=path, offset=offset, length=length) for path, offset, length in ranges]
    replies = stub.Read(weights_pb2.ReadRequest(digest=digest, ranges=wanted, **options), timeout=timeout)
    return b"".join(reply.data for reply in replies)


def reason_of(error: grpc.RpcError) -> str:
    return str(dict(error.trailing_metadata() or ()).get("modelcache-reason", ""))


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Threads and file descriptors are afterwards what they were before."""

    def state() -> tuple[set[int | None], int]:
        opened = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                opened.append(str(entry.readlink()))
        # grpc keeps event descriptors for the process, once it was used.
        # The same is true of its own threads, which Python knows as dummies once they called back.
        threads = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy-")}
        return threads, sum("anon_inode" not in name for name in opened)

    threads, descriptors = state()
    yield
    wait_until(lambda: state()[0] <= threads, f"threads left: {[t.name for t in threading.enumerate()]}", 10)
    wait_until(lambda: state()[1] <= descriptors, f"descriptors left: {state()[1]} of {descriptors}", 10)
