"""The least clients that can read ranges over each lane, into memory that is there already."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.peers import flight, grpc_bytes, raw_tcp
from modelcache.deadline import Deadline
from modelcache.http_lane import HttpLane, Server
from modelcache.security import Security
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
    token_file: str = ""
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
    authorization = Security(target.token_file).authorization()
    metadata = [("authorization", authorization)] if authorization else []

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
    """The client's own lane, as models read through it: its token read from the file for each request."""
    lane = HttpLane(Security(target.token_file, target.certificate))
    server = Server("127.0.0.1", target.port, "localhost", tls=bool(target.certificate))

    def read(offset: int, into: memoryview) -> None:
        stream = lane.open(server, target.digest, target.path, offset, len(into), Deadline(60.0))
        received = 0
        while received < len(into):
            received += stream.read_into(into[received : received + raw_tcp.STEP_BYTES])
        stream.close()

    return read
