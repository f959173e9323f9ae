"""The gRPC API as the client calls it: revision, manifest, and bytes where only this port is reachable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import grpc
from crc32c import crc32c
from google.protobuf.message import DecodeError

from modelcache.address import DEFAULT_PORT
from modelcache.errors import AccessDenied, AddressError, FileNotInSnapshot, NotReady, RevisionGone
from modelcache.lane import CorruptAtServer, LaneBroken
from modelcache_volume.records import manifest_problem
from modelcache_wire.framing import CHECKSUM_KEY, join_manifest
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelcache.address import Endpoint
    from modelcache.deadline import Deadline
    from modelcache.security import Security
    from modelcache_volume.v1 import manifest_pb2

__all__ = ["GrpcLane", "GrpcStream", "connection_advice"]

_MESSAGE_BYTES: Final = 2 * 2**20
_CALL_SECONDS: Final = 20.0
_REASON_KEY: Final = "modelcache-reason"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A server that is silent for 32 s is given up. Ours allow a ping each 10 s, and the answer waits behind the bytes
    # that are on their way: on a slow network for seconds. How long it may, gRPC takes from the third of these.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # in truth how long a connection may take, TLS and greeting included
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    # By default a name is looked up each 30 s at most: as long would a server that moved be missed.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)
_BY_REASON: Final[dict[str, tuple[type[Exception], str]]] = {
    "REVISION_GONE": (RevisionGone, "Call refresh() to move to the revision that is active now."),
    "NOT_READY": (NotReady, ""),
    "CORRUPT_BLOB": (CorruptAtServer, ""),
    "NO_SUCH_FILE": (FileNotInSnapshot, ""),
    "OUT_OF_RANGE": (FileNotInSnapshot, ""),
}
_BY_CODE: Final[dict[grpc.StatusCode, tuple[type[Exception], str]]] = {
    grpc.StatusCode.DATA_LOSS: (CorruptAtServer, ""),
    grpc.StatusCode.UNAUTHENTICATED: (AccessDenied, "Give a token that the server accepts."),
    grpc.StatusCode.PERMISSION_DENIED: (AccessDenied, "Give a token that the server accepts."),
    grpc.StatusCode.UNIMPLEMENTED: (AddressError, "It is no weight server."),
}
# What gRPC says of who listens there but is to be asked in another way; the first also of a server that is just ending.
_ADVICE: Final = (
    (
        re.compile(r"failed to connect.*(Failed parsing HTTP/2|Socket closed|Connection reset)", re.DOTALL),
        f"The address must be that of gRPC's port, {DEFAULT_PORT}, after https:// if it has TLS.",
    ),
    (re.compile("WRONG_VERSION_NUMBER"), "It speaks no TLS: leave https:// out of the address."),
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED|Hostname Verification|[Pp]eer name"),
        (
            "Its certificate must be for the host of the address, and signed by an authority in ca_file= or "
            "MODELCACHE_CA_FILE; without one, only public authorities are trusted."
        ),
    ),
)


def connection_advice(message: str) -> str:
    """What to do about a server that cannot be talked to, by what gRPC says of it; empty: nothing is known."""
    return next((advice for pattern, advice in _ADVICE if pattern.search(message)), "")


class GrpcStream:
    """Bytes of one Read call."""

    def __init__(self, lane: GrpcLane, call: Iterator[weights_pb2.ReadResponse], deadline: Deadline) -> None:
        self._lane = lane
        self._call = call
        self._deadline = deadline
        self._rest = memoryview(b"")
        deadline.cancellation.attach(self)

    def read_into(self, view: memoryview) -> int:
        """Copies up to ``len(view)`` bytes (at least one) and returns how many.

        Raises:
            LaneBroken: the call failed.
        """
        while not self._rest:
            try:
                self._rest = memoryview(next(self._call).data)
            except StopIteration as error:
                raise LaneBroken(f"{self._lane.endpoint} ended a Read call early.") from error
            except grpc.RpcError as error:
                self._deadline.remaining()
                raise self._lane.translate(error) from error
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def abort(self) -> None:
        """Cancels the call from another thread."""
        self._call.cancel()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends the call."""
        self._deadline.cancellation.detach(self)
        self.abort()

    discard = close


class GrpcLane:
    """One server's (or one name's) gRPC API.

    Args:
        endpoint: where it listens.
        security: the token for each call, and whom to trust.
    """

    def __init__(self, endpoint: Endpoint, security: Security) -> None:
        self.endpoint = endpoint
        self._security = security
        if endpoint.tls:
            credentials = grpc.ssl_channel_credentials(security.roots())
            self._channel = grpc.secure_channel(str(endpoint), credentials, options=_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(str(endpoint), options=_OPTIONS)
        self._stub = weights_pb2_grpc.WeightsStub(self._channel)
        # As bytes, whose checksum is known.
        self._get_manifest = self._channel.unary_stream(
            "/modelcache.v1.Weights/GetManifest",
            request_serializer=weights_pb2.GetManifestRequest.SerializeToString,
            response_deserializer=bytes,
        )

    def revision(
        self, known_digest: str, deadline: Deadline, seconds: float = _CALL_SECONDS
    ) -> weights_pb2.GetRevisionResponse:
        """What is active, and whether ``known_digest`` (whose lease this renews) can be read."""
        try:
            return self.ask_revision(known_digest, min(seconds, deadline.remaining()))
        except grpc.RpcError as error:
            raise self.translate(error) from error

    def ask_revision(self, known_digest: str, seconds: float) -> weights_pb2.GetRevisionResponse:
        """As ``revision``, for who has words of their own for what gRPC says.

        Raises:
            grpc.RpcError: no answer came within ``seconds``, or another one.
        """
        request = weights_pb2.GetRevisionRequest(known_digest=known_digest)
        response: weights_pb2.GetRevisionResponse = self._stub.GetRevision(
            request, timeout=seconds, metadata=self._metadata()
        )
        return response

    def manifest(self, digest: str, deadline: Deadline) -> manifest_pb2.Manifest:
        """The manifest of a snapshot ("" for the active one).

        Raises:
            LaneBroken: the call failed; or what came is not what was sent, or contradicts itself.
        """
        request = weights_pb2.GetManifestRequest(digest=digest) if digest else weights_pb2.GetManifestRequest(ref="")
        try:
            call = self._get_manifest(request, timeout=deadline.remaining(), metadata=self._metadata())
            responses = list(call)
            sent = dict(call.trailing_metadata() or ()).get(CHECKSUM_KEY)
        except grpc.RpcError as error:
            raise self.translate(error) from error
        # Others than ours need not send one; then only contradictions show.
        if sent is not None and sent != f"{crc32c(b''.join(responses)):08x}":
            raise LaneBroken(f"A manifest of {self.endpoint} arrived damaged.")
        try:
            manifest = join_manifest(weights_pb2.GetManifestResponse.FromString(each).part for each in responses)
        except DecodeError as error:
            raise LaneBroken(f"{self.endpoint} sent what is no manifest: {error}.") from error
        problem = manifest_problem(manifest)
        if not problem and digest and manifest.digest != digest:
            problem = f"it is that of {manifest.digest[:12]}"
        if problem:
            raise LaneBroken(f"{self.endpoint} sent a manifest that contradicts itself: {problem}.")
        return manifest

    def open(self, digest: str, path: str, offset: int, length: int, deadline: Deadline) -> GrpcStream:
        """Asks for bytes of a file."""
        request = weights_pb2.ReadRequest(
            digest=digest,
            ranges=[weights_pb2.Range(path=path, offset=offset, length=length)],
            max_message_bytes=_MESSAGE_BYTES,
        )
        call = self._stub.Read(request, timeout=deadline.remaining(), metadata=self._metadata())
        return GrpcStream(self, call, deadline)

    def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        authorization = self._security.authorization()
        return (("authorization", authorization),) if authorization else None

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def translate(self, error: grpc.RpcError) -> Exception:
        """The exception of this package that says what ``error`` means."""
        if not isinstance(error, grpc.Call):
            return LaneBroken(f"{self.endpoint}: {error}")
        code = error.code()
        trailing: Any = error.trailing_metadata() or ()
        reason = next((str(value) for key, value in trailing if key == _REASON_KEY), "")
        message = f"{self.endpoint} answered {' '.join(filter(None, (code.name, reason)))}: {error.details()}"
        kind, advice = _BY_REASON.get(reason) or _BY_CODE.get(code) or (LaneBroken, "")
        if code is grpc.StatusCode.UNAVAILABLE:
            advice = connection_advice(message)
        return kind(f"{message.rstrip('. ')}. {advice}" if advice else message)
