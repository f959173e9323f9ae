"""Ranges over HTTP/1.1, received straight into the tensor's memory.

Connections are kept alive and shared by all models of the process. Protocol: RFC 9110 section 14 (Range), RFC 9112.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote

from modelcache.errors import AccessDenied, FileNotInSnapshot, RevisionGone
from modelcache.lane import CorruptAtServer, LaneBroken
from modelcache.transport import PlainTransport, TlsTransport

if TYPE_CHECKING:
    from modelcache.deadline import Deadline
    from modelcache.security import Security
    from modelcache.transport import Transport

__all__ = ["HttpLane", "HttpStream"]

STALL_SECONDS: Final = 20.0
CONNECT_SECONDS: Final = 5.0
_UNANSWERED: Final = -1
_HEADER_BYTES: Final = 16 * 2**10
_FIRST_READ: Final = 1024
_IDLE_PER_SERVER: Final = 8
# How long a server that failed is tried last.
_AVOID_SECONDS: Final = 60.0


class Server(NamedTuple):
    """Where one replica's HTTP lane listens.

    Attributes:
        address: IP address.
        port: of it.
        name: the host's, which its certificate is for.
        tls: whether it speaks TLS.
    """

    address: str
    port: int
    name: str
    tls: bool

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}:{self.port}"


class _Silent(LaneBroken):
    """The server holds the connection and says nothing: so it would on another one."""


class HttpStream:
    """The body of one range response.

    Attributes:
        server: who sends it.
    """

    def __init__(self, lane: HttpLane, server: Server, transport: Transport, deadline: Deadline) -> None:
        self.server = server
        self._lane = lane
        self._transport = transport
        self._deadline = deadline
        self._left = _UNANSWERED
        self._early = memoryview(b"")
        deadline.cancellation.attach(self)

    def request(self, target: str, host: str, offset: int, length: int, authorization: str | None) -> None:
        """Sends the request and reads the response's head."""
        credentials = f"Authorization: {authorization}\r\n" if authorization else ""
        head = (
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={offset}-{offset + length - 1}\r\n"
            f"Accept-Encoding: identity\r\n{credentials}\r\n"
        )
        try:
            self._limit()
            self._transport.send(head.encode("ascii"))
            status, headers, early = self._head()
        except BlockingIOError as error:
            raise self._silent() from error
        except OSError as error:
            raise self._broken(error) from error
        if status != 206 and not (status == 200 and offset == 0):
            self._refuse(status, headers, early)
        announced = headers.get("content-length", "no")[:20]
        if announced != str(length) or len(early) > length:
            raise LaneBroken(f"{self._name()} sent {announced} bytes where {length} were asked for.")
        self._left = length
        self._early = early

    def read_into(self, view: memoryview) -> int:
        """Receives up to ``len(view)`` bytes (at least one) and returns how many.

        Raises:
            LaneBroken: the connection broke or stalled.
            Unavailable: the deadline passed, also where some bytes still come.
        """
        if self._early:
            count = min(len(view), len(self._early))
            view[:count] = self._early[:count]
            self._early = self._early[count:]
        else:
            want = min(len(view), self._left)
            self._limit()
            try:
                count = self._transport.receive_into(view[:want], self._left)
            except BlockingIOError as error:
                raise self._silent() from error
            except OSError as error:
                raise self._broken(error) from error
            if count == 0:
                raise self._broken("it closed the connection")
        self._left -= count
        return count

    def abort(self) -> None:
        """Breaks the connection from another thread: a blocked ``read_into`` returns."""
        self._transport.abort()

    def close(self) -> None:
        """Gives the connection back for the next request, or closes it when the body was not read to its end."""
        self._deadline.cancellation.detach(self)
        if self._left == 0 and not self._early and not self._deadline.cancellation.cancelled:
            self._lane.give_back(self.server, self._transport)
        else:
            self._transport.close()

    def discard(self) -> None:
        """Closes the connection; its server is tried last for a while."""
        self._left = _UNANSWERED
        self._lane.avoid(self.server)
        self.close()

    def _head(self) -> tuple[int, dict[str, str], memoryview]:
        received = bytearray()
        until = time.monotonic() + STALL_SECONDS
        while True:
            self._limit()
            chunk = self._transport.receive(_FIRST_READ)
            if not chunk:
                raise ConnectionResetError("it closed the connection")
            received += chunk
            end = received.find(b"\r\n\r\n")
            if end >= 0:
                break
            if time.monotonic() > until:
                raise _Silent(f"{self._name()} sent no whole answer for {STALL_SECONDS:g} s.")
            if len(received) > _HEADER_BYTES:
                raise LaneBroken(f"{self._name()} does not speak HTTP.")
        lines = received[:end].decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] (\d{3})(?: .*)?", lines[0])
        if match is None:
            raise LaneBroken(f"{self._name()} does not speak HTTP.")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(match[1]), headers, memoryview(bytes(received[end + 4 :]))

    def _refuse(self, status: int, headers: dict[str, str], early: memoryview) -> None:
        code = headers.get("x-error-code", "")
        said = headers.get("x-error-message") or bytes(early[:300]).decode("utf-8", "replace").strip()
        message = f"{self._name()} answered {status} {code}: {said}".rstrip(": ")
        if status == 404 and code == "RevisionGone":
            raise RevisionGone(f"{message} Call refresh() to move to the revision that is active now.")
        if status == 404:
            raise FileNotInSnapshot(message)
        if status in {401, 403}:
            raise AccessDenied(f"{message} Give a token that the server accepts.")
        if code == "CorruptBlob":
            raise CorruptAtServer(message)
        raise LaneBroken(message)

    def _limit(self) -> None:
        self._transport.limit(min(self._deadline.remaining(), STALL_SECONDS))

    def _silent(self) -> _Silent:
        self._deadline.remaining()
        return _Silent(f"{self._name()} sent nothing for {STALL_SECONDS:g} s.")

    def _broken(self, why: object) -> LaneBroken:
        self._deadline.remaining()
        return LaneBroken(f"The connection to {self._name()} broke: {why}.")

    def _name(self) -> str:
        return str(self.server)


class HttpLane:
    """Connections to weight servers, kept alive between requests and shared between models and threads.

    Args:
        security: the token for each request, and whom to trust.
    """

    def __init__(self, security: Security) -> None:
        self._security = security
        self._lock = threading.Lock()
        self._idle: defaultdict[Server, list[Transport]] = defaultdict(list)
        self._failed_at: dict[Server, float] = {}

    def open(self, server: Server, digest: str, path: str, offset: int, length: int, deadline: Deadline) -> HttpStream:
        """Asks ``server`` for bytes of a file of a snapshot.

        Raises:
            LaneBroken: the server cannot be reached, or not just now.
            RevisionGone: the digest is not on its volume.
            FileNotInSnapshot: the snapshot has no such file.
        """
        target = f"/v1/snapshots/{digest}/{quote(path)}"
        while True:
            transport, fresh = self._transport(server, deadline)
            stream = HttpStream(self, server, transport, deadline)
            try:
                stream.request(target, server.name, offset, length, self._security.authorization())
            except LaneBroken as error:
                if fresh or isinstance(error, _Silent):
                    stream.discard()
                    raise
                stream.close()  # The server may have closed a connection that was idle, which is no failure of it.
            except BaseException:
                stream.close()
                raise
            else:
                return stream

    def by_preference(self, servers: list[Server]) -> list[Server]:
        """Those that failed lately last."""
        lately = time.monotonic() - _AVOID_SECONDS
        return sorted(servers, key=lambda server: max(self._failed_at.get(server, 0.0), lately))

    def avoid(self, server: Server) -> None:
        """Notes that it failed."""
        self._failed_at[server] = time.monotonic()

    def give_back(self, server: Server, transport: Transport) -> None:
        """Keeps a connection whose response was read to its end."""
        with self._lock:
            idle = self._idle[server]
            if len(idle) < _IDLE_PER_SERVER:
                idle.append(transport)
                return
        transport.close()

    def close(self) -> None:
        """Closes the idle connections."""
        with self._lock:
            idle = [transport for transports in self._idle.values() for transport in transports]
            self._idle.clear()
        for transport in idle:
            transport.close()

    def _transport(self, server: Server, deadline: Deadline) -> tuple[Transport, bool]:
        """A connection that was kept, or a fresh one (True)."""
        with self._lock:
            idle = self._idle[server]
            if idle:
                return idle.pop(), False
        seconds = min(CONNECT_SECONDS, deadline.remaining())
        try:
            plain = PlainTransport((server.address, server.port), seconds)
            if not server.tls:
                return plain, True
            return TlsTransport(plain, self._security.context, server.name, seconds), True
        except OSError as error:
            self.avoid(server)
            raise LaneBroken(f"{server} cannot be reached: {error}.") from error
