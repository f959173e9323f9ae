"""A minute in which everything goes wrong at once: every byte that any client receives is right."""

import contextlib
import http.client
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest

from modelcache_volume import BLOCK_BYTES
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
from support.processes import Child
from support.server_redis import RedisServer, redis_server
from support.server_volume import (
    HOST,
    MIB,
    flip_bit,
    make_volume,
    metric_of,
    metrics_of,
    nothing_left_behind,
    random_bytes,
    wait_until,
)

SECONDS = 60
DATA = random_bytes(96 * MIB, 1)  # more than the cache of 64 MiB
HTTP_CLIENTS, GRPC_CLIENTS = 6, 2


class Site:
    """A server that is killed and started again, on the same ports."""

    def __init__(self, root: Path, url_file: Path) -> None:
        self._command = [root, "--host", HOST, "--cache-size", "64Mi", "--warmup", "none", "--log-level", "warning"]
        self._command += ["--redis-url-file", url_file]
        self.ports = {}
        listeners = [socket.create_server((HOST, 0)) for _ in range(3)]
        for name, listener in zip(("--port", "--http-port", "--status-port"), listeners, strict=True):
            self.ports[name] = listener.getsockname()[1]
            self._command += [name, str(listener.getsockname()[1])]
            listener.close()
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.child = Child.module("modelcache_server", *self._command)
        self.starts += 1
        wait_until(lambda: self.ready() or self.child.process.poll() is not None, "the server does not start", 30)
        assert self.child.process.poll() is None, self.child.output

    def ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return "arena_size" in metrics_of(self.ports["--status-port"])
        return False

    def metric(self, name: str) -> float:
        return metric_of(self.ports["--status-port"], name)

    def kill(self) -> None:
        self.child.kill()


class Clients:
    """Threads that read random ranges until told to stop, and remember what was wrong."""

    def __init__(self, site: Site, digest: str) -> None:
        self.site, self.digest = site, digest
        self.over = threading.Event()
        self.wrong: list[str] = []
        self.whole = self.broken = self.bytes = 0
        self._lock = threading.Lock()
        kinds = [self._http] * HTTP_CLIENTS + [self._grpc] * GRPC_CLIENTS
        self.threads = [threading.Thread(target=self._loop, args=(kind, n)) for n, kind in enumerate(kinds)]
        for thread in self.threads:
            thread.start()

    def _loop(self, read, seed: int) -> None:
        pick = random.Random(seed)
        while not self.over.is_set():
            length = pick.choice((1, 1000, BLOCK_BYTES, 12 * MIB))
            offset = pick.randrange(len(DATA) - length)
            received = bytearray()
            whole = False
            try:
                whole = read(pick, offset, length, received)
            except (OSError, http.client.HTTPException, grpc.RpcError):
                time.sleep(0.02)
            with self._lock:
                self.bytes += len(received)
                self.whole += whole
                self.broken += not whole
                if received != DATA[offset : offset + len(received)] or (whole and len(received) != length):
                    self.wrong.append(f"{read.__name__} {offset}+{length}: {len(received)} bytes, whole={whole}")

    def _http(self, pick, offset: int, length: int, received: bytearray) -> bool:
        connection = http.client.HTTPConnection(HOST, self.site.ports["--http-port"], timeout=15)
        try:
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            connection.request("GET", f"/v1/snapshots/{self.digest}/model.bin", headers=headers)
            response = connection.getresponse()
            if response.status != 206:
                return False
            leave_at = pick.randrange(length) if pick.random() < 0.2 else length
            while len(received) < leave_at and (data := response.read1(MIB)):
                received += data
            return leave_at == length == len(received)
        finally:
            connection.close()

    def _grpc(self, pick, offset: int, length: int, received: bytearray) -> bool:
        with grpc.insecure_channel(f"{HOST}:{self.site.ports['--port']}") as channel:
            wanted = [weights_pb2.Range(path="model.bin", offset=offset, length=length)]
            call = weights_pb2_grpc.WeightsStub(channel).Read(
                weights_pb2.ReadRequest(digest=self.digest, ranges=wanted), timeout=15
            )
            leave = pick.random() < 0.2
            for reply in call:
                received += reply.data
                if leave:
                    call.cancel()
                    return False
            return True

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


class Vandal:
    """Breaks one thing at a time, and mends it."""

    def __init__(self, site: Site, blob: Path, redis: RedisServer) -> None:
        self.site, self.blob, self.redis = site, blob, redis
        self.pick = random.Random(99)

    def act(self) -> None:
        self.pick.choice((self.stop_redis, self.corrupt_redis, self.corrupt_disk, self.kill_server))()

    def stop_redis(self) -> None:
        os.kill(self.redis.process.pid, signal.SIGSTOP)
        time.sleep(self.pick.uniform(0.1, 1.5))
        os.kill(self.redis.process.pid, signal.SIGCONT)

    def corrupt_redis(self) -> None:
        with self.redis.client() as client:
            for key in client.scan_iter():
                client.setrange(key, self.pick.randrange(1000), b"wrong")

    def corrupt_disk(self) -> None:
        offset = self.pick.randrange(len(DATA))
        flip_bit(self.blob, offset)
        time.sleep(self.pick.uniform(0.1, 1.0))
        flip_bit(self.blob, offset)

    def kill_server(self) -> None:
        self.site.kill()
        self.site.start()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_failures_gives_no_wrong_byte_and_leaves_nothing_behind(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": DATA})
    blob = snapshot.blob_path(snapshot.file("model.bin"))
    url = tmp_path / "url"
    with nothing_left_behind(), redis_server("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru") as redis:
        url.write_text(redis.url)
        site = Site(volume.root, url)
        try:
            clients = Clients(site, snapshot.digest)
            vandal = Vandal(site, blob, redis)
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                vandal.act()
                time.sleep(0.3)
            clients.stop()
            assert not clients.wrong
            assert clients.whole > 100, (clients.whole, clients.broken)
            assert site.starts > 2
            pid = site.child.pid
            wait_until(lambda: site.metric("http_connections") == 0, "connections are left")
            for name in ("arena_pinned_bytes", "in_flight_bytes", "waiting_requests", "grpc_streams"):
                wait_until(lambda name=name: site.metric(name) == 0, f"{name} is not zero")
            assert len(list(Path(f"/proc/{pid}/fd").iterdir())) < 60
            assert len(list(Path(f"/proc/{pid}/task").iterdir())) < 120
            assert site.child.stop() == 0
            assert "Traceback" not in site.child.output
        finally:
            site.kill()
