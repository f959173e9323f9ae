"""The gRPC lane: the API, and bytes for those who cannot use the HTTP lane."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import grpc
from crc32c import crc32c
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from modelcache_server.catalog import Catalog
from modelcache_server.errors import Reason, RequestError, ServerError, as_request_error
from modelcache_server.http_connection import Served, accepted_request_id
from modelcache_server.reader import BlockReader, pieces
from modelcache_server.routes import Authorize
from modelcache_server.store import ServedFile
from modelcache_volume import LEASE_SECONDS
from modelcache_wire.framing import CHECKSUM_KEY, split_manifest
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc

_log = logging.getLogger(__name__)
MESSAGE_BYTES = 1 << 20
MIN_MESSAGE_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 2 << 20
MAX_RANGES = 65536
_SERVICE = weights_pb2.DESCRIPTOR.services_by_name["Weights"].full_name
_SPARE_WORKERS = 16  # so that control calls and health are answered while every stream is taken
_DOMAIN = "modelcache.io"


@dataclass(frozen=True)
class Links:
    """What GetRevision says about the other lane."""

    http_port: int
    http_tls: bool


class WeightsService(weights_pb2_grpc.WeightsServicer):
    """The service Weights."""

    def __init__(
        self,
        catalog: Catalog,
        reader: BlockReader,
        authorize: Authorize,
        observe: Callable[[Served], None],
        links: Links,
        *,
        max_streams: int,
    ) -> None:
        self._catalog = catalog
        self._reader = reader
        self._authorize = authorize
        self._observe = observe
        self._links = links
        self._max_streams = max_streams
        self._lock = threading.Lock()
        self.streams = 0

    def GetRevision(  # noqa: N802 - the name is the protocol's
        self, request: weights_pb2.GetRevisionRequest, context: grpc.ServicerContext
    ) -> weights_pb2.GetRevisionResponse:
        """What is active, and whether the caller's digest is here; renews its lease."""
        with self._call("GetRevision", context):
            announced = self._catalog.active()
            return weights_pb2.GetRevisionResponse(
                active=announced.active,
                source=announced.snapshot.manifest.source,
                known_digest_available=bool(request.known_digest) and self._held(request.known_digest),
                http_port=self._links.http_port,
                http_tls=self._links.http_tls,
                lease_seconds=LEASE_SECONDS,
                volume_path=str(self._catalog.root),
            )

    def GetManifest(  # noqa: N802
        self, request: weights_pb2.GetManifestRequest, context: grpc.ServicerContext
    ) -> Iterator[weights_pb2.GetManifestResponse]:
        """A manifest in parts; after the last, their checksum: names and shapes are as easily damaged as weights."""
        with self._call("GetManifest", context) as call:
            catalog = self._catalog
            by_digest = request.WhichOneof("which") == "digest"
            snapshot = catalog.get(request.digest) if by_digest else catalog.resolve(request.ref)
            catalog.renew_lease(snapshot.digest)
            checksum = 0
            for part in split_manifest(snapshot.manifest, MESSAGE_BYTES):
                call.sent += part.ByteSize()
                response = weights_pb2.GetManifestResponse(part=part)
                checksum = crc32c(response.SerializeToString(), checksum)
                yield response
            context.set_trailing_metadata(((CHECKSUM_KEY, f"{checksum:08x}"),))

    def Read(  # noqa: N802
        self, request: weights_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[weights_pb2.ReadResponse]:
        """Bytes of many ranges, in order. Nothing is pinned while a message waits for its reader."""
        with self._call("Read", context) as call, self._stream():
            wanted = self._ranges(request)
            self._catalog.renew_lease(request.digest)
            step = min(max(request.max_message_bytes or MESSAGE_BYTES, MIN_MESSAGE_BYTES), MAX_MESSAGE_BYTES)
            for file, offset, length in wanted:
                horizon = self._reader.horizon(file, offset, length)
                for start, size in pieces(offset, length):
                    for at in range(start, start + size, step):
                        amount = min(step, start + size - at)
                        with self._reader.lend(
                            file, at, amount, client=call.client, horizon=horizon, timeout=context.time_remaining()
                        ) as loan:
                            data = bytes(loan.view)
                        call.sent += amount
                        yield weights_pb2.ReadResponse(data=data)
                        if not context.is_active():
                            return

    def _held(self, digest: str) -> bool:
        try:
            self._catalog.get(digest)
        except RequestError as error:
            if error.reason is Reason.REVISION_GONE:
                return False
            raise
        self._catalog.renew_lease(digest)
        return True

    def _ranges(self, request: weights_pb2.ReadRequest) -> list[tuple[ServedFile, int, int]]:
        """All of the call's ranges, checked before the first byte leaves."""
        if len(request.ranges) > MAX_RANGES:
            raise RequestError(Reason.INVALID_REQUEST, f"More than {MAX_RANGES} ranges in one call.")
        snapshot = self._catalog.get(request.digest)
        wanted = []
        for span in request.ranges:
            file = snapshot.file(span.path)
            if span.offset < 0 or span.length < 0 or span.offset + span.length > file.size:
                raise RequestError(
                    Reason.OUT_OF_RANGE,
                    f"{span.length} bytes at {span.offset} are outside {file.path}, which has {file.size} bytes.",
                )
            wanted.append((file, span.offset, span.length))
        return wanted

    @contextmanager
    def _stream(self) -> Iterator[None]:
        with self._lock:
            if self.streams >= self._max_streams:
                raise RequestError(
                    Reason.RESOURCE_EXHAUSTED,
                    f"The server sends {self._max_streams} streams already. Retry, or read over HTTP.",
                    retry_after=1.0,
                )
            self.streams += 1
        try:
            yield
        finally:
            with self._lock:
                self.streams -= 1

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> "Iterator[_Call]":
        """Authorize a call, turn its errors into statuses, and tell what became of it."""
        metadata = _texts(context)
        call = _Call(_address(context.peer()), accepted_request_id(metadata.get("x-request-id")))
        start = time.perf_counter()
        code, error = grpc.StatusCode.OK, ""
        try:
            self._authorize(metadata.get("authorization"))
            context.set_trailing_metadata((("x-request-id", call.request_id),))
            yield call
        except GeneratorExit:
            code, error = grpc.StatusCode.CANCELLED, "CLIENT_GONE"
            raise
        except Exception as failure:  # noqa: BLE001 - every failure becomes a status
            known = as_request_error(failure)
            if known is None:
                _log.exception("call failed method=%s request_id=%s", method, call.request_id)
                code, error = grpc.StatusCode.INTERNAL, "INTERNAL"
                context.abort(code, "Internal error; the server's log has it under the request id.")
            code, error = known.info.grpc_code, known.reason
            _abort(context, known, call.request_id)
        finally:
            self._observe(
                Served(
                    "grpc", method, "", code.name, error, call.sent, time.perf_counter() - start,
                    call.client, call.request_id,
                )
            )  # fmt: skip


@dataclass
class _Call:
    client: str
    request_id: str
    sent: int = 0


@dataclass(frozen=True)
class _Status(grpc.Status):
    """grpc's own status, with our metadata beside the details."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def _abort(context: grpc.ServicerContext, error: RequestError, request_id: str) -> NoReturn:
    """End a call with a code, google.rpc details and the metadata `modelcache-reason`."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN)]
    packed = [any_pb2.Any(), any_pb2.Any()]
    packed[0].Pack(details[0])
    if error.retry_after is not None:
        delay = duration_pb2.Duration(nanos=int(error.retry_after % 1 * 1e9), seconds=int(error.retry_after))
        packed[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    number = int(error.info.grpc_code.value[0])
    rich = status_pb2.Status(code=number, message=str(error), details=[any_ for any_ in packed if any_.type_url])
    status = rpc_status.to_status(rich)
    metadata = (
        *status.trailing_metadata,
        ("modelcache-reason", str(error.reason)),
        ("x-request-id", request_id),
    )
    context.abort_with_status(_Status(status.code, status.details, metadata))
    raise AssertionError("abort raises")


def _texts(context: grpc.ServicerContext) -> dict[str, str]:
    """The call's metadata, without binary values."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _address(peer: str) -> str:
    """The host of grpc's "ipv4:127.0.0.1:1234" or "ipv6:[::1]:1234"."""
    _, _, rest = peer.partition(":")
    host, _, _ = rest.rpartition(":")
    return host.replace("%5B", "").replace("%5D", "").strip("[]") or peer


class GrpcServer:
    """The gRPC port: Weights, health and reflection."""

    def __init__(self, *, max_streams: int) -> None:
        self._workers = ThreadPoolExecutor(max_workers=max_streams + _SPARE_WORKERS, thread_name_prefix="grpc")
        self._server = grpc.server(
            self._workers,
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.max_receive_message_length", 8 << 20),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Clients of a headless Service meet new replicas when their connection ends.
                ("grpc.max_connection_age_ms", 30 * 60_000),
            ],
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.set_serving(serving=False)

    def listen(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        """Bind; returns the port.

        Raises:
            ServerError: The address is in use or not ours.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ServerError(
                f"Cannot listen on {address} for grpc: is it in use? Choose another port, or 0 for a free one."
            ) from error

    def start(self, service: WeightsService) -> None:
        """Answer calls."""
        weights_pb2_grpc.add_WeightsServicer_to_server(service, self._server)
        self._server.start()

    def set_serving(self, *, serving: bool) -> None:
        """What the health service says."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", _SERVICE):
            self._health.set(name, status)

    def stop(self, grace: float) -> None:
        """Accept no new call, let running ones finish for `grace` seconds, then cancel them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._workers.shutdown(wait=True, cancel_futures=True)
