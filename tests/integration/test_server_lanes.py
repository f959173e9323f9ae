"""The bytes that leave the server, over both lanes."""

import hashlib
import http.client
import json
import os
import socket
from pathlib import Path

import grpc
import numpy as np
import pytest
from crc32c import crc32c
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from modelcache_server.streams import PlainStream
from modelcache_volume import BLOCK_BYTES
from modelcache_wire.framing import CHECKSUM_KEY, join_manifest
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
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
from support.serving import ServerProcess

BIG = random_bytes(3 * BLOCK_BYTES + 12345, 1)
FILES = {
    "big.bin": BIG,
    "unet/weights ü.bin": random_bytes(300 * 1024, 2),
    "small.bin": random_bytes(1000, 3),
    "empty.txt": b"",
    "config.json": b"{}",
}
EDGES = [
    (0, 1),
    (0, len(BIG)),
    (len(BIG) - 1, 1),
    (BLOCK_BYTES - 1, 2),
    (BLOCK_BYTES, BLOCK_BYTES),
    (7, 2 * BLOCK_BYTES + 1),
    (3 * BLOCK_BYTES, 12345),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("server") / "volume"
    make_volume(root, FILES)
    return root


@pytest.fixture(scope="module")
def server(root):
    with nothing_left_behind(), running(root) as server:
        yield server


@pytest.fixture(scope="module")
def digest(server: Running) -> str:
    with server.stub() as stub:
        return stub.GetRevision(weights_pb2.GetRevisionRequest()).active.digest


@pytest.fixture
def stub(server: Running):
    with server.stub() as stub:
        yield stub


@pytest.mark.parametrize("path", FILES)
def test_every_file_arrives_whole_over_both_lanes(server, stub, digest, path):
    answer = server.ask(f"/v1/snapshots/{digest}/{path.replace(' ', '%20').replace('ü', '%C3%BC')}")
    assert (answer.status, answer.body) == (200, FILES[path])
    assert answer.headers["content-length"] == str(len(FILES[path]))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["etag"] == f'"{hashlib.sha256(FILES[path]).hexdigest()}"'
    assert read_all(stub, digest, (path, 0, len(FILES[path]))) == FILES[path]


@pytest.mark.parametrize(("offset", "length"), EDGES)
def test_ranges_arrive_exactly_over_both_lanes(server, stub, digest, offset, length):
    answer = server.file(digest, "big.bin", Range=f"bytes={offset}-{offset + length - 1}")
    assert (answer.status, answer.body == BIG[offset : offset + length]) == (206, True)
    assert answer.headers["content-range"] == f"bytes {offset}-{offset + length - 1}/{len(BIG)}"
    assert read_all(stub, digest, ("big.bin", offset, length)) == BIG[offset : offset + length]


class RecordingSocket:
    """A socket that notes which of its calls send something, and from where in memory."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.sent: list[list[tuple[int, int]]] = []  # (address, length) of each part of each sendmsg

    def sendmsg(self, parts: list[memoryview]) -> int:
        self.sent.append([(np.frombuffer(part, np.uint8).ctypes.data, len(part)) for part in parts])
        return self._sock.sendmsg(parts)

    def __getattr__(self, name: str) -> object:
        assert not name.startswith("send"), f"{name} is not how bytes leave"
        return getattr(self._sock, name)


def test_each_block_leaves_by_one_sendmsg_straight_from_the_arena(root, digest, monkeypatch):
    """Never by sendfile, which would send what the slot holds next."""
    recorded: list[RecordingSocket] = []

    def recording(sock: socket.socket, *, send_seconds: float) -> PlainStream:
        del send_seconds  # however slow this machine is: a send that is cut short would be two
        recorded.append(RecordingSocket(sock))
        return PlainStream(recorded[-1], send_seconds=30)

    monkeypatch.setattr("modelcache_server.http_server.PlainStream", recording)
    monkeypatch.setattr(os, "sendfile", lambda *_: pytest.fail("sendfile of memory that is used again"))
    start, end = BLOCK_BYTES - 100, 3 * BLOCK_BYTES + 5
    with running(root) as server:
        body = server.file(digest, "big.bin", Range=f"bytes={start}-{end - 1}").body
        arena = server.server._arena
        first = arena._address()
    assert body == BIG[start:end]
    (connection,) = recorded
    (head, *blocks), *others = connection.sent
    assert [length for _, length in [*blocks, *(part for sent in others for part in sent)]] == [
        100,
        BLOCK_BYTES,
        BLOCK_BYTES,
        5,
    ]
    assert [len(sent) for sent in connection.sent] == [2, 1, 1, 1]  # the head leaves with the first bytes
    for address, length in [*blocks, *(part for sent in others for part in sent)]:
        assert first <= address <= first + arena.size - length
    assert head[1] < 1024


def test_many_ranges_in_one_call_arrive_in_the_order_asked_for(stub, digest):
    ranges = [("big.bin", 9 * n, 5) for n in range(5000)] + [("small.bin", 3, 4), ("empty.txt", 0, 0)]
    expected = b"".join(FILES[path][offset : offset + length] for path, offset, length in ranges)
    assert read_all(stub, digest, *ranges) == expected


@pytest.mark.parametrize(("asked", "largest"), [(0, MIB), (1, 64 * 1024), (100_000, 100_000), (99 * MIB, 2 * MIB)])
def test_messages_are_as_large_as_the_caller_wants_within_limits(stub, digest, asked, largest):
    wanted = [weights_pb2.Range(path="big.bin", offset=0, length=len(BIG))]
    replies = stub.Read(weights_pb2.ReadRequest(digest=digest, ranges=wanted, max_message_bytes=asked))
    assert max(len(reply.data) for reply in replies) == largest


def test_head_tells_the_size_and_sends_nothing(server, digest):
    with socket.create_connection((HOST, server.addresses.http)) as connection:
        path = f"/v1/snapshots/{digest}/big.bin"
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(BIG)}".encode() in head
    assert body == b""


def test_a_range_outside_the_file_says_how_large_it_is(server, stub, digest):
    answer = server.file(digest, "big.bin", Range=f"bytes={len(BIG)}-")
    assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(BIG)}")
    empty = server.file(digest, "empty.txt", Range="bytes=0-")
    assert (empty.status, empty.body, empty.headers["content-range"]) == (200, b"", "bytes */0")
    for offset, length in [(len(BIG), 1), (0, len(BIG) + 1), (-1, 1), (0, -1), (2**63 - 1, 2**63 - 1)]:
        with pytest.raises(grpc.RpcError) as caught:
            read_all(stub, digest, ("big.bin", 0, 1), ("big.bin", offset, length))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(caught.value) == "OUT_OF_RANGE"


def test_conditional_requests_save_bytes_and_never_mix_versions(server, digest):
    etag = server.file(digest, "big.bin", Range="bytes=0-0").headers["etag"]
    unchanged = server.file(digest, "big.bin", If_None_Match=etag)
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert server.file(digest, "big.bin", Range="bytes=0-9", If_Range=etag).status == 206
    other = server.file(digest, "big.bin", Range="bytes=0-9", If_Range='"other"')
    assert (other.status, other.body == BIG) == (200, True)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/snapshots/DIGEST/nope", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST/../big.bin", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST/%2e%2e/%2e%2e/FORMAT", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST//etc/passwd", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST/unet", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST/", 404, "EntryNotFound"),
        ("/v1/snapshots/DIGEST", 404, "EntryNotFound"),
        ("/", 404, "EntryNotFound"),
        ("/v1/snapshots/" + "0" * 64 + "/big.bin", 404, "RevisionGone"),
        ("/v1/snapshots/../big.bin", 400, "InvalidRequest"),
        ("/v1/snapshots/DIGEST/%00", 400, "InvalidRequest"),
    ],
)
def test_what_is_not_in_the_snapshot_is_not_there(server, digest, path, status, code):
    answer = server.ask(path.replace("DIGEST", digest))
    assert (answer.status, answer.headers["x-error-code"]) == (status, code)


def test_the_lane_is_read_only(server, digest):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = server.ask(f"/v1/snapshots/{digest}/big.bin", method=method, Content_Length="0")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_connection_is_kept_for_request_after_request(server, digest):
    connection = http.client.HTTPConnection(HOST, server.addresses.http)
    for number in range(50):
        connection.request("GET", f"/v1/snapshots/{digest}/big.bin", headers={"Range": f"bytes={number}-{number + 9}"})
        if not number:
            sock = connection.sock
        assert connection.getresponse().read() == BIG[number : number + 10]
        assert connection.sock is sock
    connection.close()


def test_pipelined_requests_are_answered_in_order(server, digest):
    one = "GET /v1/snapshots/{}/big.bin HTTP/1.1\r\nHost: h\r\nRange: bytes={}-{}\r\n{}\r\n"
    requests = [one.format(digest, n, n, "Connection: close\r\n" if n == 99 else "") for n in range(100)]
    with socket.create_connection((HOST, server.addresses.http)) as connection:
        connection.sendall("".join(requests).encode())
        answers = connection.makefile("rb").read().split(b"HTTP/1.1 206 Partial Content\r\n")[1:]
    assert [answer.partition(b"\r\n\r\n")[2] for answer in answers] == [BIG[n : n + 1] for n in range(100)]


@pytest.mark.parametrize(("lines", "status"), [(1, b"206"), (3, b"400"), (10_000, b"400")])
def test_one_empty_line_before_a_request_is_forgiven(server, digest, lines, status):
    with socket.create_connection((HOST, server.addresses.http)) as connection:
        request = (
            f"GET /v1/snapshots/{digest}/big.bin HTTP/1.1\r\nHost: h\r\nRange: bytes=0-0\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(b"\r\n" * lines + request.encode())
        assert connection.makefile("rb").readline().split()[1] == status


def test_request_ids_come_back_and_hostile_ones_are_replaced(server, stub, digest):
    assert server.file(digest, "config.json", X_Request_Id="my-id-1").headers["x-request-id"] == "my-id-1"
    assert server.file(digest, "config.json", X_Request_Id='a" evil').headers["x-request-id"] != 'a" evil'
    call = stub.GetRevision.with_call(weights_pb2.GetRevisionRequest(), metadata=(("x-request-id", "my-id-2"),))[1]
    assert ("x-request-id", "my-id-2") in [(item.key, item.value) for item in call.trailing_metadata()]


def test_every_request_has_a_line_of_json_in_the_log_with_its_id(root, digest):
    with ServerProcess.over(root, "--cache-size", "64Mi") as program:
        connection = http.client.HTTPConnection(HOST, program.http_port)
        for name, path in (("id-1", "big.bin"), ("id-2", "nope")):
            connection.request("GET", f"/v1/snapshots/{digest}/{path}", headers={"X-Request-Id": name})
            connection.getresponse().read()
        connection.close()
        with grpc.insecure_channel(program.address) as channel:
            stub = weights_pb2_grpc.WeightsStub(channel)
            stub.GetRevision(weights_pb2.GetRevisionRequest(), metadata=(("x-request-id", "id-3"),))
        program.wait_for('"id-3"')
        lines = {line.get("request_id"): line for line in map(json.loads, program.output.splitlines())}
    told = {key: [line[field] for field in ("lane", "method", "code", "reason")] for key, line in lines.items() if key}
    assert told == {
        "id-1": ["http", "GET", "200", ""],
        "id-2": ["http", "GET", "404", "NO_SUCH_FILE"],
        "id-3": ["grpc", "GetRevision", "OK", ""],
    }
    assert lines["id-1"]["bytes"] >= len(BIG)
    assert lines["id-1"]["seconds"] >= 0
    assert lines["id-1"]["client"] == HOST


def test_the_manifest_comes_by_digest_ref_or_commit(server, stub, digest):
    def manifest(**which):
        return join_manifest(reply.part for reply in stub.GetManifest(weights_pb2.GetManifestRequest(**which)))

    by_digest = manifest(digest=digest)
    assert {file.path: file.size for file in by_digest.files} == {path: len(data) for path, data in FILES.items()}
    assert manifest() == manifest(ref="") == manifest(ref="main") == manifest(ref="a" * 40) == by_digest
    for which, reason in (({"ref": "v9"}, "UNKNOWN_REF"), ({"digest": "0" * 64}, "REVISION_GONE")):
        with pytest.raises(grpc.RpcError) as caught:
            manifest(**which)
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, reason)


def test_a_manifest_comes_with_the_checksum_of_its_bytes(server):
    with grpc.insecure_channel(f"{HOST}:{server.addresses.grpc}") as channel:
        ask = channel.unary_stream("/modelcache.v1.Weights/GetManifest")  # requests and responses as bytes
        call = ask(weights_pb2.GetManifestRequest(ref="").SerializeToString())
        received = b"".join(call)
        assert dict(call.trailing_metadata())[CHECKSUM_KEY] == f"{crc32c(received):08x}"


def test_get_revision_links_to_the_other_lane_and_knows_what_is_here(server, stub, digest):
    reply = stub.GetRevision(weights_pb2.GetRevisionRequest(known_digest=digest))
    assert reply.http_port == server.addresses.http
    assert not reply.http_tls
    assert reply.known_digest_available
    assert reply.lease_seconds == 600
    assert reply.source.repo_id == "org/name"
    gone = stub.GetRevision(weights_pb2.GetRevisionRequest(known_digest="0" * 64))
    assert not gone.known_digest_available
    assert gone.active.digest == digest


def test_unknown_files_and_digests_fail_before_a_byte_is_sent(stub, digest):
    cases = [
        (digest, "nope", "NO_SUCH_FILE", grpc.StatusCode.INVALID_ARGUMENT),
        ("0" * 64, "big.bin", "REVISION_GONE", grpc.StatusCode.NOT_FOUND),
        ("../x", "big.bin", "INVALID_REQUEST", grpc.StatusCode.INVALID_ARGUMENT),
        ("", "big.bin", "INVALID_REQUEST", grpc.StatusCode.INVALID_ARGUMENT),
    ]
    for asked, path, reason, code in cases:
        with pytest.raises(grpc.RpcError) as caught:
            read_all(stub, asked, ("big.bin", 0, 10), (path, 0, 1))
        assert (reason_of(caught.value), caught.value.code()) == (reason, code)
        assert caught.value.details()


def test_health_and_reflection_speak_to_stock_tools(server):
    with grpc.insecure_channel(f"{HOST}:{server.addresses.grpc}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "modelcache.v1.Weights"):
            wait_until(
                lambda service=service: (
                    health.Check(health_pb2.HealthCheckRequest(service=service)).status
                    == health_pb2.HealthCheckResponse.SERVING
                ),
                "not serving",
            )
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection.ServerReflectionInfo(iter([request]))
        names = {service.name for service in listed.list_services_response.service}
    assert "modelcache.v1.Weights" in names


def test_status_port_answers_probes_and_prometheus(server):
    assert server.status("/healthz").status == 200
    assert server.status("/readyz").status == 200
    assert server.status("/other").status == 404
    metrics = server.status("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for name in (
        "build_info",
        'requests_total{code="206",lane="http",method="GET"}',
        'sent_bytes_total{lane="grpc"}',
        'cache_hits_total{tier="memory"}',
        "arena_size_bytes",
        "request_duration_seconds_bucket",
    ):
        assert f"modelcache_server_{name}" in metrics.body.decode(), name
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert f"\n{name} " in metrics.body.decode(), name
    assert server.metric("arena_size_bytes") == 64 * MIB
    assert server.metric("arena_pinned_bytes") == 0


def test_a_flipped_bit_on_disk_never_reaches_a_client(tmp_path):
    files = {"big.bin": BIG, "small.bin": FILES["small.bin"], "good.bin": FILES["unet/weights ü.bin"]}
    volume, snapshot = make_volume(tmp_path / "volume", files)
    flip_bit(snapshot.blob_path(snapshot.file("big.bin")), 2 * BLOCK_BYTES + 5)
    flip_bit(snapshot.blob_path(snapshot.file("small.bin")), 500)
    with running(volume.root, warmup_bytes=0) as server, server.stub() as stub:
        digest = snapshot.digest
        received = bytearray()
        connection = http.client.HTTPConnection(HOST, server.addresses.http)
        connection.request("GET", f"/v1/snapshots/{digest}/big.bin")
        response = connection.getresponse()
        with pytest.raises(http.client.IncompleteRead) as cut:
            response.read()
        received += cut.value.partial
        assert bytes(received) == BIG[: 2 * BLOCK_BYTES]
        connection.close()
        for path, span in (("big.bin", f"bytes={2 * BLOCK_BYTES}-"), ("small.bin", "bytes=0-9")):
            answer = server.file(digest, path, Range=span)
            assert (answer.status, answer.headers["x-error-code"]) == (500, "CorruptBlob")
        wanted = [weights_pb2.Range(path="big.bin", offset=5, length=len(BIG) - 5)]
        replies = stub.Read(weights_pb2.ReadRequest(digest=digest, ranges=wanted))
        parts = []
        with pytest.raises(grpc.RpcError) as caught:
            parts.extend(reply.data for reply in replies)
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_BLOB")
        assert b"".join(parts) == BIG[5 : 2 * BLOCK_BYTES]
        assert server.file(digest, "good.bin").body == files["good.bin"]
        assert server.metric('errors_total{lane="http",reason="CORRUPT_BLOB"}') == 3
        assert server.metric("arena_pinned_bytes") == 0


def test_a_truncated_or_missing_blob_is_corrupt_and_nothing_is_sent(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"a.bin": BIG, "b.bin": random_bytes(2 * MIB, 9)})
    with running(volume.root, warmup_bytes=0) as server:
        with snapshot.blob_path(snapshot.file("a.bin")).open("r+b") as file:
            file.truncate(100)
        snapshot.blob_path(snapshot.file("b.bin")).unlink()
        for path in ("a.bin", "b.bin"):
            answer = server.file(snapshot.digest, path)
            assert (answer.status, answer.headers["x-error-code"]) == (500, "CorruptBlob")


@pytest.mark.parametrize("damage", [lambda blob: flip_bit(blob, 3), lambda blob: os.truncate(blob, MIB)])
def test_a_repaired_blob_is_served_without_a_restart(tmp_path, damage):
    volume, snapshot = make_volume(tmp_path / "volume", {"a.bin": BIG})
    blob = snapshot.blob_path(snapshot.file("a.bin"))
    with running(volume.root, warmup_bytes=0) as server:
        assert server.file(snapshot.digest, "a.bin", Range="bytes=-1").body == BIG[-1:]  # the blob is open from now on
        damage(blob)
        assert server.file(snapshot.digest, "a.bin").status == 500
        repaired = blob.with_name("repaired")
        repaired.write_bytes(BIG)
        repaired.rename(blob)
        assert server.file(snapshot.digest, "a.bin").body == BIG


def test_a_cache_smaller_than_the_model_serves_all_of_it(tmp_path):
    data = random_bytes(80 * MIB, 4)
    volume, snapshot = make_volume(tmp_path / "volume", {"a.bin": data})
    with running(volume.root) as server, server.stub() as stub:
        for _ in range(2):
            assert server.file(snapshot.digest, "a.bin").body == data
        assert read_all(stub, snapshot.digest, ("a.bin", 0, len(data))) == data
        assert server.metric("arena_used_bytes") == 64 * MIB
        assert server.metric('cache_evictions_total{tier="memory"}') > 0
