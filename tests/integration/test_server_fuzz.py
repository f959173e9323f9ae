"""Requests without sense, on each lane: the right code, no crash, and no byte from outside the snapshot."""

import random
import socket

import grpc
import pytest

from modelcache_volume import BLOCK_BYTES
from modelcache_wire.v1 import weights_pb2
from support.server_volume import HOST, Running, make_volume, nothing_left_behind, random_bytes, reason_of, running

FILES = {
    "model.bin": random_bytes(2 * BLOCK_BYTES + 999, 1),
    "small.bin": random_bytes(5000, 2),
    "empty": b"",
}
SECRET = b"root:x:0:0"
NUMBERS = (
    0,
    1,
    4095,
    BLOCK_BYTES - 1,
    BLOCK_BYTES,
    2 * BLOCK_BYTES + 999,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
)
PATHS = (
    *FILES, "nope", "", ".", "..", "../../FORMAT", "..%2f..%2fFORMAT", "/etc/passwd", "%2fetc%2fpasswd", "model.bin/",
    "model.bin%00", "%", "%ff", "a" * 3000, "model.bin?x=1", "//", "small.bin/../model.bin", "\\..\\x", "%2e%2e/x",
)  # fmt: skip
ODD_LINES = (
    "Content-Length: 5", "Content-Length: -1", "Transfer-Encoding: chunked", " folded", "no colon", "X : y",
    "Host: twice", "If-None-Match: *", "If-Range: x", "Connection: close", "X: " + "y" * 9000, "Expect: 100-continue",
    "Upgrade: h2c", "Authorization: Bearer x", "If-Match: x", "Expect: x",
)  # fmt: skip
FEW, MANY = 2_000, 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    volume, snapshot = make_volume(tmp_path_factory.mktemp("fuzz") / "volume", FILES)
    with nothing_left_behind(), running(volume.root) as server:
        yield server, snapshot.digest


class HttpFuzzer:
    """Sends requests over kept connections and reads the answers as a strict client does."""

    def __init__(self, server: Running, digest: str, seed: int) -> None:
        self._port = server.addresses.http
        self._digest = digest
        self._random = random.Random(seed)
        self._connection: socket.socket | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _number(self) -> str:
        chosen = self._random.choice(NUMBERS)
        return self._random.choice((str(chosen), f"-{chosen}", f"+{chosen}", f"{chosen}.0", f" {chosen}", "x", ""))

    def _range(self) -> str:
        choice = self._random.random()
        if choice < 0.5:
            first, last = self._random.choice(NUMBERS[:6]), self._random.choice(NUMBERS)
            return f"bytes={first}-{last}"
        if choice < 0.8:
            return f"bytes={self._number()}-{self._number()}"
        if choice < 0.9:
            return "bytes=" + ",".join(f"{n}-{n}" for n in range(self._random.randrange(100)))
        return self._random.choice(("", "bytes", "bytes=", "bytes=-", "lines=1-2", "bytes=0-0-0", "=", "bytes 0-1"))

    def request(self) -> tuple[bytes, str]:
        """(bytes to send, the file whose bytes may be in the answer)."""
        pick = self._random
        path = pick.choice(PATHS)
        digest = pick.choice((self._digest,) * 8 + ("0" * 64, self._digest[:-1], "..", ""))
        ref = pick.choice(("main",) * 8 + ("HEAD", "refs/heads/main", "refs", "0" * 40, "%2e%2e", "a%2Fb", ""))
        folder = pick.choice((f"/v1/snapshots/{digest}", f"/org/name/resolve/{ref}"))
        origin = pick.choice(("",) * 8 + ("http://other", "HTTPS://[::1]:1", "ftp://other", "http://"))
        method = pick.choice(("GET",) * 12 + ("HEAD", "POST", "DELETE", "get", "G T", ""))
        version = pick.choice(("HTTP/1.1",) * 20 + ("HTTP/1.0", "HTTP/2.0", "HTTP/1.1 ", "http/1.1", ""))
        lines = [f"{method} {origin}{folder}/{path} {version}", "Host: h", f"Range: {self._range()}"]
        if pick.random() < 0.1:
            lines.append(pick.choice(ODD_LINES))
        data = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        if lines[-1] == "Content-Length: 5":
            data += b"hello"
        if pick.random() < 0.05:
            position = pick.randrange(len(data))
            data = data[:position] + pick.randbytes(3) + data[position:]
            # Only a head that still ends gets an answer without more bytes.
            data += b"\r\n\r\n"
        return data, path

    def once(self) -> None:
        data, path = self.request()
        if self._connection is None:
            self._connection = socket.create_connection((HOST, self._port), timeout=20)
        try:
            self._connection.sendall(data)
            self._read_answer(data, path)
        except (ConnectionResetError, BrokenPipeError):
            self.close()  # the answer was sent and the connection closed while we still wrote

    def _read_answer(self, data: bytes, path: str) -> None:
        assert self._connection is not None
        answer = b""
        while b"\r\n\r\n" not in answer:
            more = self._connection.recv(65536)
            assert more, f"no answer to {data!r}"
            answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        assert status in {200, 206, 304, 400, 404, 405, 408, 412, 416, 417, 431, 505}, (status, data)
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = 0 if data.startswith(b"HEAD") or status == 304 else int(headers[b"content-length"])
        while len(body) < length:
            more = self._connection.recv(1 << 20)
            assert more, f"the answer to {data!r} was cut"
            body += more
        assert SECRET not in body
        if status == 200 and length:
            assert body[:length] in FILES.values()
        if status == 206:
            span = headers[b"content-range"].removeprefix(b"bytes ").partition(b"/")[0].split(b"-")
            first, last = map(int, span)
            assert any(body[:length] == content[first : last + 1] for content in FILES.values()) or not length, path
        if headers[b"connection"] == b"close" or len(body) > length:
            # Bytes that were slipped in may have made two requests of one: start afresh.
            self.close()


def fuzz_http(server, count: int, seed: int) -> None:
    running_server, digest = server
    fuzzer = HttpFuzzer(running_server, digest, seed)
    try:
        for _ in range(count):
            fuzzer.once()
    finally:
        fuzzer.close()
    assert running_server.file(digest, "model.bin").body == FILES["model.bin"]
    with pytest.raises(AssertionError, match="no metric"):
        running_server.metric('errors_total{lane="http",reason="INTERNAL"}')


def read(stub, request: weights_pb2.ReadRequest) -> bytes | grpc.RpcError:
    try:
        return b"".join(reply.data for reply in stub.Read(request, timeout=20))
    except grpc.RpcError as error:
        return error


def fuzz_grpc(server, count: int, seed: int) -> None:
    running_server, digest = server
    pick = random.Random(seed)
    signed = tuple(number for number in NUMBERS if number < 2**63)
    allowed = {
        "NO_SUCH_FILE": grpc.StatusCode.INVALID_ARGUMENT,
        "OUT_OF_RANGE": grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
        "REVISION_GONE": grpc.StatusCode.NOT_FOUND,
    }
    with running_server.stub() as stub:
        for _ in range(count):
            ranges = []
            for _ in range(pick.choice((0, 1, 1, 1, 1, 2, 50))):
                path = pick.choice((*FILES, *FILES, *PATHS))
                offset, length = (pick.choice(signed) * pick.choice((1, 1, 1, -1)) for _ in range(2))
                ranges.append(weights_pb2.Range(path=path, offset=offset, length=min(length, 70_000)))
            request = weights_pb2.ReadRequest(
                digest=pick.choice((digest,) * 8 + ("0" * 64, "", "..", digest.upper())),
                ranges=ranges,
                max_message_bytes=pick.choice((0, 1, 2**31, 2**32 - 1)),
            )
            expected = b"".join(FILES.get(r.path, b"")[r.offset : r.offset + r.length] for r in ranges)
            outcome = read(stub, request)
            if isinstance(outcome, bytes):
                assert all(r.offset >= 0 and r.length >= 0 for r in ranges)
                assert outcome == expected
            else:
                assert allowed.get(reason_of(outcome)) is outcome.code(), (outcome, request)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Read(weights_pb2.ReadRequest(digest=digest, ranges=[weights_pb2.Range()] * 65_537)))
        assert reason_of(caught.value) == "INVALID_REQUEST"
    with pytest.raises(AssertionError, match="no metric"):
        running_server.metric('errors_total{lane="grpc",reason="INTERNAL"}')


def test_malformed_http_requests_get_the_right_code_and_no_foreign_byte(server):
    fuzz_http(server, FEW, seed=1)


def test_malformed_reads_get_the_right_code_and_no_foreign_byte(server):
    fuzz_grpc(server, FEW, seed=2)


def test_bytes_that_are_no_call_do_the_grpc_port_no_harm(server):
    running_server, digest = server
    pick = random.Random(5)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for number in range(300):
        noise = pick.randbytes(pick.randrange(1, 2000))
        with socket.create_connection((HOST, running_server.addresses.grpc), timeout=20) as client:
            try:
                client.sendall((b"GET / HTTP/1.1\r\n\r\n", noise, preface + noise)[number % 3])
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
    with running_server.stub() as stub:
        request = weights_pb2.ReadRequest(digest=digest, ranges=[weights_pb2.Range(path="small.bin", length=5000)])
        assert read(stub, request) == FILES["small.bin"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_malformed_http_requests(server):
    fuzz_http(server, MANY, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_malformed_reads(server):
    fuzz_grpc(server, MANY, seed=4)
