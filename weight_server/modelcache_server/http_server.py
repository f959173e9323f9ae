"""Accepts HTTP connections, with a limit on how many and a stop that lets replies finish.

Plain connections wait in a lobby and share threads; one with TLS has its own, since bytes that wait in its buffers do
not show at the socket.
"""

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

from modelcache_server import congestion
from modelcache_server.errors import ServerError
from modelcache_server.http_connection import App, CutConnection, HttpConnection, Served
from modelcache_server.lobby import Guest, Lobby, shut_reading
from modelcache_server.reader import BlockReader
from modelcache_server.settings import HttpLimits
from modelcache_server.streams import PlainStream, Stream, TlsStream

_log = logging.getLogger(__name__)
_SEND_SECONDS = 0.5  # for which one send may hold a block
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


class HttpServer:
    """One listening port."""

    def __init__(
        self,
        app: App,
        *,
        lane: str,
        limits: HttpLimits,
        observe: Callable[[Served], None],
        reader: BlockReader | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
        congestion_control: str = "",
    ) -> None:
        """Answer with `app`; `tls` gives the context for the next connection, so that certificates can change.

        `congestion_control`: as `congestion.choose` takes it.
        """
        self._app = app
        self._lane = lane
        self._limits = limits
        self._observe = observe
        self._reader = reader
        self._tls = tls
        self._congestion_control = congestion_control
        self._lock = threading.Lock()
        self._open: dict[socket.socket, HttpConnection | None] = {}  # None until TLS is agreed on
        self._threads: set[threading.Thread] = set()
        self._all_closed = threading.Condition(self._lock)
        self._lobby: Lobby | None = None
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._stopping = False

    @property
    def connections(self) -> int:
        """Open connections now."""
        return len(self._open)

    def start(self, host: str, port: int) -> int:
        """Listen; returns the port.

        Raises:
            ServerError: The address is in use or not ours, or the congestion control is not there.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            raise ServerError(
                f"Cannot listen on {host}:{port} for {self._lane}: {os.strerror(error.errno or 0)}. "
                "Choose another port, or 0 for a free one."
            ) from error
        try:
            congestion.choose(listener, self._congestion_control)
        except ServerError:
            listener.close()
            raise
        self._listener = listener
        if self._tls is None:
            self._lobby = Lobby(self._serve_guest, name=self._lane)
        self._acceptor = threading.Thread(target=self._accept, name=f"{self._lane}-accept", daemon=True)
        self._acceptor.start()
        return int(self._listener.getsockname()[1])

    def stop(self, grace: float) -> None:
        """Accept nothing more, let replies in progress finish for `grace` seconds, then cut the rest."""
        self._stopping = True
        if self._listener is None or self._acceptor is None:
            return
        _cut(self._listener)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            threads = list(self._threads)
            for sock, connection in self._open.items():
                if connection is not None:
                    connection.stopping = True
                shut_reading(sock)
            self._all_closed.wait_for(lambda: not self._open, grace)
            for sock in self._open:
                _cut(sock)
            self._all_closed.wait_for(lambda: not self._open)
        for thread in threads:
            thread.join()
        lobby, self._lobby = self._lobby, None  # stopping twice is stopping once
        if lobby is not None:
            lobby.close()

    def _accept(self) -> None:
        if self._listener is None:
            raise AssertionError("start listens first")
        while not self._stopping:
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                # Out of descriptors or the like: what is open goes on, and the rest may try again.
                _log.warning("accept failed lane=%s: %s", self._lane, error)
                time.sleep(0.1)
                continue
            with self._lock:
                full = len(self._open) >= self._limits.connections
                if not full:
                    self._open[sock] = None
            if full:
                self._turn_away(sock)
            else:
                self._admit(sock, str(address[0]))

    def _admit(self, sock: socket.socket, client: str) -> None:
        lobby = self._lobby
        if lobby is not None:
            self._guarded(sock, client, lambda: self._enter(lobby, sock, client))
            return
        thread = threading.Thread(target=self._serve_tls, args=(sock, client), name=f"{self._lane}-tls", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _turn_away(self, sock: socket.socket) -> None:
        _log.warning("connection refused lane=%s: %d are open", self._lane, self._limits.connections)
        with sock:
            sock.setblocking(False)
            if self._tls is None:
                try:
                    sock.send(_FULL)
                except OSError:
                    return

    def _connect(self, sock: socket.socket, stream: Stream, client: str) -> HttpConnection:
        connection = HttpConnection(
            stream, client, self._app, self._reader, self._limits, self._observe, lane=self._lane
        )
        with self._lock:
            connection.stopping = self._stopping
            self._open[sock] = connection
        return connection

    def _enter(self, lobby: Lobby, sock: socket.socket, client: str) -> bool:
        connection = self._connect(sock, PlainStream(sock, send_seconds=_SEND_SECONDS), client)
        lobby.enter(Guest(sock, client, connection))
        return True

    def _serve_guest(self, guest: Guest, step_aside: Callable[[], None]) -> bool:
        return self._guarded(guest.sock, guest.client, lambda: guest.connection.serve(step_aside))

    def _serve_tls(self, sock: socket.socket, client: str) -> None:
        def serve() -> bool:
            if self._tls is None:
                raise AssertionError("plain connections go to the lobby")
            plain = PlainStream(sock, send_seconds=_SEND_SECONDS)
            stream = TlsStream(plain, self._tls(), handshake_seconds=self._limits.header_seconds)
            return self._connect(sock, stream, client).serve()

        self._guarded(sock, client, serve)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _guarded(self, sock: socket.socket, client: str, serve: Callable[[], bool]) -> bool:
        """Whether the connection goes on; if not, it is closed."""
        try:
            if serve():
                return True
        except CutConnection as cut:
            _log.info("connection cut lane=%s client=%s reason=%s", self._lane, client, cut)
        except (OSError, ssl.SSLError) as error:
            _log.debug("connection lost lane=%s client=%s: %s", self._lane, client, error)
        except Exception:  # noqa: BLE001 - a bug ends one connection, not the server
            _log.exception("connection failed lane=%s client=%s", self._lane, client)
        with self._lock:
            del self._open[sock]
            sock.close()
            self._all_closed.notify_all()
        return False


def _cut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was first
