"""A model's servers: which answers, what is active there, and its bytes over the fastest lane that is reachable."""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from modelcache.address import Endpoint, is_repo_id, resolve
from modelcache.deadline import Cancellation, Deadline
from modelcache.errors import AddressError, NotReady, RevisionGone, Unavailable
from modelcache.grpc_lane import GrpcLane
from modelcache.http_lane import HttpLane, Server
from modelcache.lane import LaneBroken
from modelcache.security import Security

if TYPE_CHECKING:
    from modelcache.lane import ByteStream
    from modelcache_volume.v1.manifest_pb2 import Manifest
    from modelcache_wire.v1.weights_pb2 import GetRevisionResponse

__all__ = ["Connection", "PinnedSnapshot", "connect"]

logger = logging.getLogger("modelcache")

_SAY_SECONDS: Final = 10.0
# A server that is ready is asked for as long even by who does not want to wait.
_LEAST_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.25
# How long HTTP is left alone where only gRPC answered, and how long gRPC may take to answer then.
_PROBE_SECONDS: Final = 5.0
_HTTP_AGAIN_SECONDS: Final = 30.0
_NAME_SECONDS: Final = 5.0
_MANIFEST_SECONDS: Final = 60.0
_KEPT_MANIFESTS: Final = 4


class _Replica:
    """What is known about one endpoint."""

    def __init__(self, endpoint: Endpoint, security: Security) -> None:
        self.endpoint = endpoint
        self.grpc = GrpcLane(endpoint, security)
        self.http_port: int | None = None
        self.http_tls = False
        self.http_failed_at = 0.0
        self.avoided_at = 0.0
        self._addresses: tuple[str, ...] = ()
        self._resolved_at = 0.0

    def learn(self, response: GetRevisionResponse) -> None:
        if response.http_port != self.http_port:
            self.http_failed_at = 0.0
        self.http_port = response.http_port
        self.http_tls = response.http_tls

    def addresses(self) -> tuple[str, ...]:
        """IP addresses of the host, looked up again every few seconds, since pods come and go."""
        now = time.monotonic()
        if not self._addresses or now - self._resolved_at > _NAME_SECONDS:
            try:
                found = socket.getaddrinfo(self.endpoint.host, None, type=socket.SOCK_STREAM)
            except OSError as error:
                raise LaneBroken(f"The name {self.endpoint.host} cannot be resolved: {error}.") from error
            self._addresses = tuple(dict.fromkeys(str(each[4][0]) for each in found))
            self._resolved_at = now
        return self._addresses


class Connection:
    """The servers of one model, shared by everything in the process that reads from them.

    Args:
        endpoints: tried in this order; the first that answers is used until it fails.
        security: the token, and whom to trust.
    """

    def __init__(self, endpoints: tuple[Endpoint, ...], security: Security) -> None:
        self.endpoints = endpoints
        self.security = security
        self._replicas = [_Replica(endpoint, security) for endpoint in endpoints]
        self._manifests: dict[str, Manifest] = {}
        self._lock = threading.Lock()
        self._http = HttpLane(security)
        self.users = 0
        self.lane = "none"

    def revision(self, known_digest: str, deadline: Deadline) -> GetRevisionResponse:
        """Asks the first server that answers what is active; renews the lease of ``known_digest``.

        Raises:
            LaneBroken: none answers.
            NotReady: a server answers, but has no active revision.
        """
        problem: Exception = LaneBroken("There is no server to ask.")
        for replica in self._by_preference():
            try:
                response = replica.grpc.revision(known_digest, deadline)
            except (LaneBroken, NotReady) as error:
                self._note_failure(replica)
                problem = error
                continue
            replica.learn(response)
            return response
        raise problem

    def await_revision(self, known_digest: str, deadline: Deadline) -> GetRevisionResponse:
        """As ``revision``, but where no server answers it asks again until the deadline.

        Raises:
            Unavailable: none answered.
            NotReady: a server answers, but has no active revision.
        """
        while True:
            try:
                return self.revision(known_digest, deadline)
            except LaneBroken as error:
                deadline.note(error)
                deadline.pause(_POLL_SECONDS)

    def manifest(self, digest: str, deadline: Deadline) -> Manifest:
        """A snapshot's manifest, from the first server that has it; not to be changed."""
        known = self._manifests.get(digest)
        if known is None:
            known = self._read_manifest(digest, deadline)
            with self._lock:
                while len(self._manifests) >= _KEPT_MANIFESTS:
                    del self._manifests[next(iter(self._manifests))]
                self._manifests[digest] = known
        return known

    def _read_manifest(self, digest: str, deadline: Deadline) -> Manifest:
        while True:
            problem: Exception | None = None
            for replica in self._by_preference():
                try:
                    return replica.grpc.manifest(digest, deadline)
                except (LaneBroken, RevisionGone) as error:
                    self._note_failure(replica)
                    problem = error
            if isinstance(problem, RevisionGone):
                raise problem
            deadline.note(problem)
            deadline.pause(_POLL_SECONDS)

    def open(self, digest: str, path: str, offset: int, length: int, deadline: Deadline) -> ByteStream:
        """Starts to read a range: over HTTP, or over gRPC where only that port is reachable."""
        problem: LaneBroken = LaneBroken("There is no server to ask.")
        for replica in self._by_preference():
            try:
                return self._open_at(replica, digest, path, offset, length, deadline)
            except LaneBroken as error:
                self._note_failure(replica)
                problem = error
        raise problem

    def blame(self, error: LaneBroken) -> None:
        """Has the replica that served last tried last."""
        logger.debug("read failed, trying elsewhere: %s", error)
        with self._lock:
            current = self._replicas[0]
            current.avoided_at = time.monotonic()

    def close(self) -> None:
        """Closes the gRPC channels and the HTTP connections that nobody reads from."""
        self._http.close()
        for replica in self._replicas:
            replica.grpc.close()

    def _open_at(
        self, replica: _Replica, digest: str, path: str, offset: int, length: int, deadline: Deadline
    ) -> ByteStream:
        if replica.http_port is None:
            replica.learn(replica.grpc.revision(digest, deadline))
        if replica.http_port and time.monotonic() - replica.http_failed_at > _HTTP_AGAIN_SECONDS:
            try:
                stream = self._open_http(replica, digest, path, offset, length, deadline)
            except LaneBroken as error:
                known = replica.http_port
                # Raises when the whole server is away.
                replica.learn(replica.grpc.revision(digest, deadline, _PROBE_SECONDS))
                if replica.http_port != known:
                    raise  # It came back on another port, which the next attempt uses.
                replica.http_failed_at = time.monotonic()
                logger.info("%s Reading over gRPC instead, which is slower.", error)
            else:
                self.lane = "http"
                return stream
        self.lane = "grpc"
        return replica.grpc.open(digest, path, offset, length, deadline)

    def _open_http(
        self, replica: _Replica, digest: str, path: str, offset: int, length: int, deadline: Deadline
    ) -> ByteStream:
        host, port, tls = replica.endpoint.host, replica.http_port or 0, replica.http_tls
        servers = [Server(address, port, host, tls) for address in replica.addresses()]
        problem = LaneBroken(f"{replica.endpoint.host} has no address.")
        for server in self._http.by_preference(servers):
            try:
                return self._http.open(server, digest, path, offset, length, deadline)
            except LaneBroken as error:
                problem = error
        raise problem

    def _by_preference(self) -> list[_Replica]:
        """Replicas in the order in which they were given, those that failed last."""
        with self._lock:
            self._replicas.sort(key=lambda replica: replica.avoided_at)
            return list(self._replicas)

    def _note_failure(self, replica: _Replica) -> None:
        with self._lock:
            replica.avoided_at = time.monotonic()


class PinnedSnapshot:
    """One snapshot of a connection: what readers ask for bytes.

    Attributes:
        connection: its servers.
        digest: of its content.
        volume_path: folder of the volume on the server's machine, which may be this one.
    """

    def __init__(self, connection: Connection, digest: str = "", volume_path: str = "") -> None:
        self.connection = connection
        self.digest = digest
        self.volume_path = volume_path
        self._lock = threading.Lock()
        self._closed = False

    @functools.cached_property
    def manifest(self) -> Manifest:
        """What it contains; read when it is first asked for, unless a volume of this machine has told."""
        return self.connection.manifest(self.digest, Deadline(_MANIFEST_SECONDS))

    def open(self, path: str, offset: int, length: int, deadline: Deadline) -> ByteStream:
        """Starts to read a range of a file."""
        return self.connection.open(self.digest, path, offset, length, deadline)

    def blame(self, error: LaneBroken) -> None:
        """Says that the last stream failed."""
        self.connection.blame(error)

    def follow(self, digest: str, volume_path: str) -> PinnedSnapshot:
        """Pins another snapshot of the same connection; both are to be closed."""
        _retain(self.connection)
        return PinnedSnapshot(self.connection, digest, volume_path)

    def close(self) -> None:
        """Ends its use of the connection, which is closed with its last user."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with _connections_lock:
            self.connection.users -= 1
            last = self.connection.users == 0
            if last:
                _connections.pop((self.connection.endpoints, self.connection.security), None)
        if last:
            self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_connections: dict[tuple[tuple[Endpoint, ...], Security], Connection] = {}
_connections_lock = threading.Lock()


def connect(
    name: str,
    *,
    address: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    wait_timeout: float = 600.0,
    cancellation: Cancellation | None = None,
) -> PinnedSnapshot:
    """Finds the server of ``name``, waits until it is ready, and pins what is active there now.

    Args:
        name: of the ModelCache, or a repoId (then the server must serve that repo).
        address: ``host:port``, several separated by commas; default: MODELCACHE_ADDRESS, else ``NAME-weights:9090``.
        token_file: with a bearer token; default: MODELCACHE_TOKEN_FILE.
        ca_file: authorities to trust for TLS (PEM); default: MODELCACHE_CA_FILE, else public ones.
        wait_timeout: seconds to wait for a server that is not there yet; why is logged each 10 s. 0: it is asked once.
        cancellation: ends the wait.

    Raises:
        NotReady: still not ready after ``wait_timeout``.
        AddressError: no address, or it serves another repository.
    """
    endpoints = resolve(name, address, os.environ)
    security = Security.of(token_file, ca_file, os.environ)
    key = (endpoints, security)
    with _connections_lock:
        connection = _connections.get(key) or _connections.setdefault(key, Connection(endpoints, security))
        connection.users += 1
    pinned = PinnedSnapshot(connection)
    try:
        response = _wait_for_revision(connection, name, Deadline(wait_timeout, cancellation))
        _check_name(name, response, endpoints)
        pinned.digest = response.active.digest
        pinned.volume_path = response.volume_path
    except BaseException:
        pinned.close()
        raise
    return pinned


def _retain(connection: Connection) -> None:
    with _connections_lock:
        connection.users += 1


def _wait_for_revision(connection: Connection, name: str, deadline: Deadline) -> GetRevisionResponse:
    where = ", ".join(str(endpoint) for endpoint in connection.endpoints)
    said_at = started = time.monotonic()
    problem: Exception | None = None
    short = deadline.seconds < _LEAST_SECONDS
    asking = Deadline(_LEAST_SECONDS, deadline.cancellation) if short else deadline
    while True:
        try:
            response = connection.revision("", asking)
            if response.active.digest:
                return response
            problem = NotReady("it has no active revision yet")
        except (LaneBroken, NotReady) as error:
            problem = error
        except Unavailable as error:
            # The time ended in the middle of a round: the round before says what is wrong.
            problem = problem or error
        now = time.monotonic()
        if now - said_at >= _SAY_SECONDS:
            said_at = now
            logger.warning("Waiting for %s at %s since %.0f s: %s", name or "a model", where, now - started, problem)
        try:
            deadline.pause(_POLL_SECONDS)
        except Unavailable:
            why = str(problem).rstrip(". ")
            raise NotReady(
                f"{name or 'The model'} was not ready at {where} after {deadline.seconds:g} s: {why}. "
                f"`kubectl describe modelcache {name}` says why; `modelcache up -f …` serves it on this machine."
            ) from problem


def _check_name(name: str, response: GetRevisionResponse, endpoints: tuple[Endpoint, ...]) -> None:
    """A repoId must be the one that is served; a ModelCache's name found the server already."""
    served, active = response.source.repo_id, response.active.name
    if name and not is_repo_id(name) and active and name != active:
        logger.warning("%s serves %r; it is used for %r, as its address was given.", endpoints[0], active, name)
    if is_repo_id(name) and name.removeprefix("hf://") != served.removeprefix("hf://"):
        raise AddressError(f"{endpoints[0]} serves {served!r}, not {name!r}: correct address= or the name.")
