"""Accepts HTTP connections: a thread for each, a limit on how many, and a stop that lets replies finish."""

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

from modelcache_server.errors import ServerError
from modelcache_server.http_connection import App, CutConnection, HttpConnection, Served
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
    ) -> None:
        """Answer with `app`; `tls` gives the context for the next connection, so that certificates can change."""
        self._app = app
        self._lane = lane
        self._limits = limits
        self._observe = observe
        self._reader = reader
        self._tls = tls
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._serving: set[HttpConnection] = set()
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
            ServerError: The address is in use or not ours.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            raise ServerError(
                f"Cannot listen on {host}:{port} for {self._lane}: {os.strerror(error.errno or 0)}. "
                "Choose another port, or 0 for a free one."
            ) from error
        self._acceptor = threading.Thread(target=self._accept, name=f"{self._lane}-accept", daemon=True)
        self._acceptor.start()
        return int(self._listener.getsockname()[1])

    def stop(self, grace: float) -> None:
        """Accept nothing more, let replies in progress finish for `grace` seconds, then cut the rest."""
        self._stopping = True
        if self._listener is None or self._acceptor is None:
            return
        _shutdown(self._listener, socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            for connection in self._serving:
                connection.stopping = True
            opened = list(self._open.items())
            for sock, _ in opened:
                _shutdown(sock, socket.SHUT_RD)  # wakes those that wait for a request; sending goes on
        deadline = time.monotonic() + grace
        for _, thread in opened:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for sock in self._open:
                _shutdown(sock, socket.SHUT_RDWR)
        for _, thread in opened:
            thread.join()

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
                    thread = threading.Thread(
                        target=self._serve, args=(sock, str(address[0])), name=f"{self._lane}-{address[1]}", daemon=True
                    )
                    self._open[sock] = thread
                    thread.start()
            if full:
                self._turn_away(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        _log.warning("connection refused lane=%s: %d are open", self._lane, self._limits.connections)
        with sock:
            sock.setblocking(False)
            if self._tls is None:
                try:
                    sock.send(_FULL)
                except OSError:
                    return

    def _serve(self, sock: socket.socket, client: str) -> None:
        connection: HttpConnection | None = None
        try:
            plain = PlainStream(sock, send_seconds=_SEND_SECONDS)
            stream: Stream = plain
            if self._tls is not None:
                stream = TlsStream(plain, self._tls(), handshake_seconds=self._limits.header_seconds)
            connection = HttpConnection(
                stream, client, self._app, self._reader, self._limits, self._observe, lane=self._lane
            )
            with self._lock:
                connection.stopping = self._stopping
                self._serving.add(connection)
            connection.serve()
        except CutConnection as cut:
            _log.info("connection cut lane=%s client=%s reason=%s", self._lane, client, cut)
        except (OSError, ssl.SSLError) as error:
            _log.debug("connection lost lane=%s client=%s: %s", self._lane, client, error)
        except Exception:  # noqa: BLE001 - a bug ends one connection, not the server
            _log.exception("connection failed lane=%s client=%s", self._lane, client)
        finally:
            with self._lock:
                self._open.pop(sock, None)
                if connection is not None:
                    self._serving.discard(connection)
                sock.close()


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        return  # the other side was first
