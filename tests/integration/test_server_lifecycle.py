"""Starting, following the active revision, misbehaving clients, and stopping."""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from modelcache_server import HttpLimits, Server, ServerError, ServerSettings
from modelcache_server.admission import Admission
from modelcache_volume import BLOCK_BYTES, NotAVolume, Volume
from modelcache_wire.v1 import weights_pb2
from support.processes import Child
from support.server_volume import (
    HOST,
    MIB,
    Running,
    flip_bit,
    make_volume,
    nothing_left_behind,
    random_bytes,
    read_all,
    reason_of,
    running,
    wait_until,
)
from support.volumes import publish

COMMON = random_bytes(2 * BLOCK_BYTES, 1)
OLD = {"common.bin": COMMON, "model.bin": random_bytes(2 * BLOCK_BYTES, 2)}
NEW = {"common.bin": COMMON, "model.bin": random_bytes(2 * BLOCK_BYTES, 3)}


@pytest.fixture(autouse=True)
def _tidy():
    with nothing_left_behind():
        yield


def activate(volume: Volume, files: dict[str, bytes], *, name: str = "m", **source: str):
    return make_volume(volume.root, files, name=name, **source)[1]


def revision(server: Running) -> str:
    with server.stub() as stub:
        return stub.GetRevision(weights_pb2.GetRevisionRequest()).active.digest


def ask_slowly(server: Running, digest: str, path: str, *, address: str = HOST) -> socket.socket:
    """A client that asks for a file and then reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.bind((address, 0))
    client.connect((HOST, server.addresses.http))
    client.sendall(f"GET /v1/snapshots/{digest}/{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    return client


def read_to_end(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read().partition(b"\r\n\r\n")[2]


def test_a_server_without_a_model_waits_for_one_and_says_so(tmp_path):
    volume = Volume.create(tmp_path / "volume")
    with running(volume.root, ready=False) as server, server.stub() as stub:
        answer = server.status("/readyz")
        assert answer.status == 503
        assert b"fetch a model" in answer.body
        assert server.status("/healthz").status == 200
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetRevision(weights_pb2.GetRevisionRequest())
        assert reason_of(caught.value) == "NOT_READY"
        early = server.file("0" * 64, "model.bin")
        assert (early.status, early.headers["x-error-code"]) == (503, "NotReady")
        assert "retry-after" in early.headers
        snapshot = activate(volume, OLD)
        assert server.server.wait_ready(10)
        assert server.status("/readyz").status == 200
        assert server.file(snapshot.digest, "model.bin").body == OLD["model.bin"]


def test_a_new_revision_is_warm_and_announced_within_two_seconds_and_shared_blocks_stay(tmp_path):
    volume, old = make_volume(tmp_path / "volume", OLD)
    with running(volume.root, poll_seconds=0.5) as server:
        loaded = server.metric("load_duration_seconds_count")
        new = activate(volume, NEW, commit="b" * 40)
        start = time.monotonic()
        wait_until(lambda: revision(server) == new.digest, "not announced")
        assert time.monotonic() - start < 2
        assert server.metric("load_duration_seconds_count") == loaded + 2  # the file that changed
        assert server.file(new.digest, "model.bin").body == NEW["model.bin"]
        assert server.metric("load_duration_seconds_count") == loaded + 2
        assert server.file(old.digest, "model.bin").body == OLD["model.bin"]
        assert server.metric("active_generation") == 2


def test_a_read_in_progress_is_not_torn_by_an_activation(tmp_path):
    data = random_bytes(24 * MIB, 5)
    volume, old = make_volume(tmp_path / "volume", {"model.bin": data})
    with running(volume.root) as server:
        reader = ask_slowly(server, old.digest, "model.bin")
        new = activate(volume, NEW, commit="b" * 40)
        wait_until(lambda: revision(server) == new.digest, "not announced")
        assert read_to_end(reader) == data


def test_a_pruned_snapshot_is_gone_and_never_other_bytes(tmp_path):
    volume, old = make_volume(tmp_path / "volume", OLD)
    with running(volume.root) as server, server.stub() as stub:
        new = activate(volume, NEW, commit="b" * 40)
        newest = activate(volume, {"other.bin": COMMON}, commit="c" * 40)
        wait_until(lambda: revision(server) == newest.digest, "not announced")
        shutil.rmtree(volume.root / "leases")
        with volume.lock(wait=5) as writer:
            assert old.digest in writer.prune().digests
        wait_until(lambda: server.file(old.digest, "model.bin").status == 404, "still served")
        assert server.file(old.digest, "model.bin").headers["x-error-code"] == "RevisionGone"
        with pytest.raises(grpc.RpcError) as caught:
            read_all(stub, old.digest, ("model.bin", 0, 1))
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "REVISION_GONE")
        assert not stub.GetRevision(weights_pb2.GetRevisionRequest(known_digest=old.digest)).known_digest_available
        assert server.file(new.digest, "model.bin").body == NEW["model.bin"]


def test_a_damaged_new_revision_leaves_the_old_one_serving(tmp_path):
    volume, old = make_volume(tmp_path / "volume", OLD)
    with running(volume.root) as server:
        with volume.lock(wait=5) as writer:
            new = publish(writer, NEW, commit="b" * 40)
            flip_bit(new.blob_path(new.file("model.bin")), 77)
            writer.activate("m", new, requested="main")
        wait_until(lambda: server.server._watch.problem, "the damage was not noticed")
        assert revision(server) == old.digest
        assert server.status("/readyz").status == 200
        assert server.file(old.digest, "model.bin").body == OLD["model.bin"]


def test_a_damaged_small_file_is_told_at_the_start(tmp_path, caplog):
    volume, snapshot = make_volume(tmp_path / "volume", {**OLD, "config.json": b"{}"})
    flip_bit(snapshot.blob_path(snapshot.file("config.json")), 1)
    with running(volume.root):
        assert any("active snapshot is damaged" in record.message for record in caplog.records)


def test_only_the_own_source_and_what_was_active_is_served(tmp_path):
    volume, own = make_volume(tmp_path / "volume", OLD, name="own")
    secret = activate(volume, {"secret.bin": COMMON}, name="other", repo_id="org/private")
    with running(volume.root, name="own") as server:
        assert server.file(secret.digest, "secret.bin").headers["x-error-code"] == "RevisionGone"
        moved = activate(volume, NEW, name="own", repo_id="org/elsewhere")
        wait_until(lambda: revision(server) == moved.digest, "not announced")
        assert server.file(own.digest, "model.bin").body == OLD["model.bin"]
    with running(volume.root, name="own") as restarted:
        assert restarted.file(own.digest, "model.bin").body == OLD["model.bin"], "it is in the history"


def test_a_volume_with_several_models_needs_a_name(tmp_path):
    volume, _ = make_volume(tmp_path / "volume", OLD, name="one")
    activate(volume, NEW, name="two", repo_id="org/two")
    with running(volume.root, ready=False) as server:
        wait_until(lambda: b"one, two" in server.status("/readyz").body, "does not name them")


def test_readers_hold_leases(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", OLD)
    with running(volume.root, lease_holder="pod-1") as server:
        assert volume.leased() == set()
        server.file(snapshot.digest, "model.bin", Range="bytes=0-0")
        assert volume.leased() == {snapshot.digest}
        assert [holder for _, holder, _ in volume.leases()] == ["pod-1"]
        shutil.rmtree(volume.root / "leases")
        server.server._catalog._renewed.clear()
        with server.stub() as stub:
            assert stub.GetRevision(
                weights_pb2.GetRevisionRequest(known_digest=snapshot.digest)
            ).known_digest_available, "a lease that cannot be written fails no reader"
        assert server.metric("lease_failures_total") == 1


def test_a_hundred_requests_for_a_cold_block_read_it_once(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", OLD)
    with running(volume.root, warmup_bytes=0, read_ahead=0) as server:
        start = threading.Barrier(100)
        bodies = []

        def ask() -> None:
            start.wait()
            bodies.append(server.file(snapshot.digest, "model.bin", Range="bytes=0-99").body)

        threads = [threading.Thread(target=ask) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bodies == [OLD["model.bin"][:100]] * 100
        assert server.metric("load_duration_seconds_count") == 1


def test_a_stop_lets_readers_finish_while_probes_say_unready(tmp_path):
    data = random_bytes(40 * MIB, 5)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})
    with running(volume.root, cache_bytes=64 * MIB) as server, server.stub() as stub:
        http_reader = ask_slowly(server, snapshot.digest, "model.bin")
        wanted = [weights_pb2.Range(path="model.bin", offset=0, length=len(data))]
        replies = stub.Read(weights_pb2.ReadRequest(digest=snapshot.digest, ranges=wanted))
        received = [next(replies).data]
        idle = socket.create_connection((HOST, server.addresses.http))
        wait_until(lambda: server.metric("http_connections") == 2, "not connected")
        stopping = threading.Thread(target=server.server.stop, args=(20.0,))
        stopping.start()
        wait_until(lambda: server.status("/readyz").status == 503, "still ready")
        assert server.status("/healthz").status == 200
        assert idle.recv(1) == b""
        idle.close()
        assert read_to_end(http_reader) == data
        received += [reply.data for reply in replies]
        assert b"".join(received) == data
        stopping.join(20)
        assert not stopping.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, server.addresses.http))


def test_a_stop_cuts_readers_that_take_longer_than_the_grace(tmp_path):
    data = random_bytes(40 * MIB, 5)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})
    with running(volume.root, grace=0.2) as server:
        reader = ask_slowly(server, snapshot.digest, "model.bin")
        assert reader.recv(1) == b"H"
        start = time.monotonic()
        server.server.stop(0.2)
        assert time.monotonic() - start < 5
        with contextlib.suppress(ConnectionResetError):
            assert len(read_to_end(reader)) < len(data)


def test_readers_that_do_not_read_pin_nothing_for_long_and_are_cut(tmp_path):
    data = random_bytes(60 * MIB, 6)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})
    limits = HttpLimits(stall_seconds=3)
    with running(volume.root, http=limits, inflight_bytes=8 * MIB) as server:
        stalled = [ask_slowly(server, snapshot.digest, "model.bin", address="127.0.0.2") for _ in range(20)]
        wait_until(lambda: server.metric("waiting_requests") > 0, "the budget is not used up")
        assert server.file(snapshot.digest, "model.bin", Range="bytes=0-4194303").body == data[:BLOCK_BYTES]
        wait_until(lambda: server.metric("http_connections") == 0, "stalled readers are not cut", 90)
        assert server.metric("arena_pinned_bytes") == 0
        assert server.metric("in_flight_bytes") == 0
        for client in stalled:
            client.close()


def read_for_ever(server: Running, target: str, address: str, over: threading.Event) -> None:
    """A client that asks for the same file again and again on one connection."""
    with socket.create_connection((HOST, server.addresses.http), source_address=(address, 0)) as client:
        while not over.is_set():
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            answer = client.makefile("rb")
            while (line := answer.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.startswith(b"Content-Length") else 0
            while length:
                length -= len(answer.read1(min(length, MIB)))


def test_greedy_readers_get_one_block_each_while_a_modest_one_waits(tmp_path, monkeypatch):
    """Two clients read without end over four connections each; a third reads a layer."""
    data = random_bytes(40 * MIB, 6)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})
    turns: list[tuple[str, str]] = []  # as the lock of Admission orders them

    def noted(what: str, method):
        def note(self: Admission, client: str, amount: int):
            turns.append((what, client))
            return method(self, client, amount)

        return note

    monkeypatch.setattr(Admission, "_queue", noted("waits", Admission._queue))
    monkeypatch.setattr(Admission, "_take", noted("takes", Admission._take))
    over = threading.Event()
    modest, greedy = HOST, ("127.0.0.2", "127.0.0.3")
    with running(volume.root, inflight_bytes=2 * BLOCK_BYTES) as server:
        target = f"/v1/snapshots/{snapshot.digest}/model.bin"
        readers = [
            threading.Thread(target=read_for_ever, args=(server, target, address, over)) for address in greedy * 4
        ]
        for reader in readers:
            reader.start()

        def has_waited_often() -> bool:
            answer = server.file(snapshot.digest, "model.bin", Range=f"bytes=0-{5 * BLOCK_BYTES - 1}")
            assert answer.body == data[: 5 * BLOCK_BYTES]
            return turns.count(("waits", modest)) >= 10

        try:
            wait_until(has_waited_often, "nobody is in its way", 60)
        finally:
            over.set()
            for reader in readers:
                reader.join()
    others = 0
    waiting = False
    for what, client in turns:
        if client == modest:
            waiting, others = what == "waits", 0
        elif waiting and what == "takes":
            others += 1
            # Each of the two may be in line before it once; eight connections would be four times as many.
            assert others <= len(greedy)


def test_a_cancelled_read_frees_its_stream(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": random_bytes(40 * MIB, 5)})
    with running(volume.root, max_streams=2) as server, server.stub() as stub:
        wanted = [weights_pb2.Range(path="model.bin", offset=0, length=40 * MIB)]
        request = weights_pb2.ReadRequest(digest=snapshot.digest, ranges=wanted)
        for _ in range(3):
            calls = [stub.Read(request) for _ in range(2)]
            for call in calls:
                next(call)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Read(request))
            assert (caught.value.code(), reason_of(caught.value)) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RESOURCE_EXHAUSTED",
            )
            for call in calls:
                call.cancel()
            wait_until(lambda: server.metric("grpc_streams") == 0, "a stream is left")


def test_a_deadline_ends_a_read(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": random_bytes(40 * MIB, 5)})
    with running(volume.root) as server, server.stub() as stub:
        wanted = [weights_pb2.Range(path="model.bin", offset=0, length=40 * MIB)] * 100
        call = stub.Read(weights_pb2.ReadRequest(digest=snapshot.digest, ranges=wanted), timeout=0.3)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: server.metric("grpc_streams") == 0, "the stream is left")


def test_a_client_that_sends_its_request_byte_by_byte_is_turned_away(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", OLD)
    with running(volume.root, http=HttpLimits(header_seconds=0.5)) as server:
        loris = socket.create_connection((HOST, server.addresses.http))
        loris.sendall(b"GET / HTTP/1.1\r\n")
        deadline = time.monotonic() + 10
        loris.settimeout(0.05)
        answer = b""
        while not answer:
            assert time.monotonic() < deadline, "the slow client is still served"
            with contextlib.suppress(TimeoutError):
                loris.sendall(b"X")
                answer = loris.recv(100)
        assert answer.startswith(b"HTTP/1.1 408 ")
        loris.close()
        assert server.file(snapshot.digest, "model.bin").status == 200


def test_silent_connections_are_closed(tmp_path):
    volume, _ = make_volume(tmp_path / "volume", OLD)
    with (
        running(volume.root, http=HttpLimits(idle_seconds=0.2)) as server,
        socket.create_connection((HOST, server.addresses.http), timeout=10) as silent,
    ):
        assert silent.recv(1) == b""


def test_connections_beyond_the_limit_are_told_to_come_again(tmp_path):
    volume, _ = make_volume(tmp_path / "volume", OLD)
    with running(volume.root, http=HttpLimits(connections=3)) as server:
        held = [socket.create_connection((HOST, server.addresses.http)) for _ in range(3)]
        wait_until(lambda: server.metric("http_connections") == 3, "not connected")
        with socket.create_connection((HOST, server.addresses.http), timeout=10) as extra:
            assert extra.recv(100).startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        wait_until(lambda: server.metric("http_connections") == 0, "not closed")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 20_000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n0123456789", b"400"),
        (b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n0123456789", b"405"),
        (b"POST /api/models/org/name/paths-info/main HTTP/1.1\r\nHost: h\r\nContent-Length: 300000\r\n\r\nx", b"413"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
    ],
)
def test_what_is_no_proper_request_is_answered_and_the_connection_closed(tmp_path, sent, status):
    volume, _ = make_volume(tmp_path / "volume", {"config.json": b"{}"})
    with running(volume.root) as server:
        with socket.create_connection((HOST, server.addresses.http), timeout=10) as client:
            client.sendall(sent)
            answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b"Connection: close" in answer


def test_a_port_in_use_is_one_clear_error_and_nothing_runs(tmp_path):
    volume, _ = make_volume(tmp_path / "volume", OLD)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        for which in ("grpc_port", "http_port", "status_port"):
            ports = {"grpc_port": 0, "http_port": 0, "status_port": 0, which: port}
            server = Server(ServerSettings(root=volume.root, host=HOST, cache_bytes=64 * MIB, **ports))
            with pytest.raises(ServerError, match=str(port)):
                server.start()


def test_a_folder_without_anything_to_serve_is_refused(tmp_path):
    with pytest.raises((NotAVolume, ServerError)):
        Server(ServerSettings(root=tmp_path, cache_bytes=64 * MIB))


def start_program(root: Path, *options: str) -> tuple[Child, dict[str, int]]:
    ports = ["--host", HOST, "--port", "0", "--http-port", "0", "--status-port", "0"]
    program = Child.module("modelcache_server", root, *ports, "--cache-size", "64Mi", "--log-format", "text", *options)
    found = program.wait_for(r"listening host=\S+ grpc=(\d+) http=(\d+) status=(\d+)")
    return program, dict(zip(("grpc", "http", "status"), map(int, found.groups()), strict=True))


def fetch(port: int, digest: str, path: str) -> bytes:
    client = socket.create_connection((HOST, port), timeout=30)
    client.sendall(f"GET /v1/snapshots/{digest}/{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    return read_to_end(client)


def test_the_program_ends_with_success_when_it_is_told_to(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", OLD)
    for number in (signal.SIGTERM, signal.SIGINT):
        program, ports = start_program(volume.root)
        with program:
            assert fetch(ports["http"], snapshot.digest, "model.bin") == OLD["model.bin"]
            os.kill(program.pid, number)
            assert program.wait() == 0, program.output
        assert "Traceback" not in program.output


def test_a_server_killed_at_any_time_serves_the_same_after_a_restart(tmp_path):
    data = random_bytes(40 * MIB, 5)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})
    program, ports = start_program(volume.root)
    with program:
        client = socket.create_connection((HOST, ports["http"]), timeout=30)
        client.sendall(f"GET /v1/snapshots/{snapshot.digest}/model.bin HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        received = client.recv(4096)
        program.kill()
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(MIB):
                received += more
        client.close()
        assert data.startswith(received.partition(b"\r\n\r\n")[2])
    program, ports = start_program(volume.root)
    with program:
        assert fetch(ports["http"], snapshot.digest, "model.bin") == data


def test_the_program_says_in_a_sentence_why_it_cannot_serve(tmp_path):
    with Child.module("modelcache_server", tmp_path / "nothing") as program:
        assert program.wait() == 1
        assert "modelcache-server: " in program.output
        assert "Traceback" not in program.output


def test_a_cache_without_huge_pages_is_said(tmp_path, caplog, monkeypatch):
    volume, _ = make_volume(tmp_path / "volume", {"model.bin": b"x"})
    given = {"huge": 64 * MIB}
    monkeypatch.setattr("modelcache_server.arena.Arena.page_use", lambda arena: (arena.size, given["huge"]))
    with running(volume.root):
        assert "huge pages" not in caplog.text
    given["huge"] = 2 * MIB
    with running(volume.root) as server:
        assert "only 2 of the cache's 64 MiB are in huge pages" in caplog.text
        assert server.metric("arena_huge_bytes") == 2 * MIB


def test_whose_turn_does_not_come_is_told_when_to_come_again_on_both_lanes(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": random_bytes(MIB)})
    with running(volume.root, inflight_bytes=4 * MIB, queue_seconds=0.1) as server, server.stub() as stub:
        admission = server.server._admission
        admission.acquire("another client", 4 * MIB, timeout=1)
        answer = server.file(snapshot.digest, "model.bin")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["x-error-code"] == "ResourceExhausted"
        with pytest.raises(grpc.RpcError) as caught:
            read_all(stub, snapshot.digest, ("model.bin", 0, MIB))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        status = rpc_status.from_call(caught.value)
        assert [detail.Unpack(kind) for detail, kind in zip(status.details, (reason, retry), strict=True)] == [True] * 2
        assert (reason.reason, reason.domain) == ("RESOURCE_EXHAUSTED", "modelcache.io")
        assert retry.retry_delay.seconds == 1
        assert server.metric("queue_duration_seconds_count") == 2
        admission.release("another client", 4 * MIB)
        assert server.file(snapshot.digest, "model.bin").status == 200
