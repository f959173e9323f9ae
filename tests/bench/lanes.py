"""The least clients that can read ranges over each lane, into memory that is there already."""

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.peers import flight, grpc_bytes, raw_tcp
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc

Read = Callable[[int, memoryview], None]
"""Receives `len(into)` bytes from an offset on."""


@dataclass(frozen=True)
class Target:
    """Where the bytes are: a lane, a port on this machine, and what our own server needs to know besides."""

    lane: str
    port: int
    digest: str = ""
    path: str = ""
    token: str = ""
    certificate: str = ""


def open_lane(target: Target) -> Read:
    """A connection of its own."""
    return {
        "raw": _raw,
        "http": _http,
        "https": _http,
        "grpc": _grpc,
        "grpc_bytes": _grpc_bytes,
        "grpc_tls": _grpc_bytes,
        "flight": _flight,
    }[target.lane](target)


def _raw(target: Target) -> Read:
    connection = raw_tcp.connect(target.port)
    return lambda offset, into: raw_tcp.request(connection, offset, into)


def _flight(target: Target) -> Read:
    client = flight.connect(target.port)
    return lambda offset, into: flight.read(client, offset, into)


def _grpc_bytes(target: Target) -> Read:
    if target.lane == "grpc_bytes":
        channel = grpc_bytes.connect(target.port)
    else:
        credentials = grpc.ssl_channel_credentials(Path(target.certificate).read_bytes())
        channel = grpc.secure_channel(f"localhost:{target.port}", credentials, options=grpc_bytes.OPTIONS)
    return lambda offset, into: grpc_bytes.read(channel, offset, into)


def _grpc(target: Target) -> Read:
    # A channel of its own connection each, as separate clients have.
    channel = grpc.insecure_channel(f"127.0.0.1:{target.port}", options=[("grpc.use_local_subchannel_pool", 1)])
    stub = weights_pb2_grpc.WeightsStub(channel)
    metadata = [("authorization", f"Bearer {target.token}")] if target.token else []

    def read(offset: int, into: memoryview) -> None:
        wanted = [weights_pb2.Range(path=target.path, offset=offset, length=len(into))]
        received = 0
        for reply in stub.Read(weights_pb2.ReadRequest(digest=target.digest, ranges=wanted), metadata=metadata):
            into[received : received + len(reply.data)] = reply.data
            received += len(reply.data)
        if received != len(into):
            raise ConnectionError(f"{received} of {len(into)} bytes came")

    return read


def _http(target: Target) -> Read:
    connection = raw_tcp.connect(target.port)
    receive = _Decrypted(connection, target.certificate) if target.lane == "https" else _Plain(connection)
    head = (
        f"GET /v1/snapshots/{target.digest}/{target.path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {target.token}\r\nRange: bytes="
    )

    def read(offset: int, into: memoryview) -> None:
        receive.send(f"{head}{offset}-{offset + len(into) - 1}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += receive.some(1024)
        start, _, rest = answer.partition(b"\r\n\r\n")
        if not start.startswith(b"HTTP/1.1 206 "):
            raise ConnectionError(start.decode("latin-1"))
        into[: len(rest)] = rest
        received = len(rest)
        while received < len(into):
            count = receive.into(into[received : received + raw_tcp.STEP_BYTES])
            if not count:
                raise ConnectionError("the server closed the connection")
            received += count

    return read


class _Plain:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.send = connection.sendall
        self.some = connection.recv

    def into(self, view: memoryview) -> int:
        return self._connection.recv_into(view, 0, socket.MSG_WAITALL)


class _Decrypted:
    """TLS through memory buffers: SSLSocket asks the kernel for each record of 16 KiB, this for 256 KiB."""

    def __init__(self, connection: socket.socket, certificate: str) -> None:
        self._connection = connection
        self._received = memoryview(bytearray(256 * 1024))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=certificate)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            else:
                self._flush()
                return

    def send(self, data: bytes) -> None:
        self._tls.write(data)
        self._flush()

    def some(self, size: int) -> bytes:
        view = memoryview(bytearray(size))
        return bytes(view[: self.into(view)])

    def into(self, view: memoryview) -> int:
        while True:
            try:
                return self._tls.read(len(view), view)
            except ssl.SSLWantReadError:
                self._feed()

    def _feed(self) -> None:
        count = self._connection.recv_into(self._received)
        if not count:
            raise ConnectionError("the server closed the connection")
        self._incoming.write(self._received[:count])

    def _flush(self) -> None:
        self._connection.sendall(self._outgoing.read())
