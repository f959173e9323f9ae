"""Bytes of a range, over blocking HTTP/1.1 connections or from a local file, into a buffer that the caller owns.

Every worker thread blocks in ``recv_into`` outside of the interpreter lock. Connections are kept alive and reused per
host; proxies, NO_PROXY and private CAs are taken from the environment as everywhere. Redirects are followed here, so
that an Authorization header never reaches a host that it was not meant for.
"""

import base64
import contextlib
import functools
import http.client
import os
import socket
import ssl
import struct
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError, SourceChangedError
from modelcache_fetcher.sources import LocalLocation

MAX_REDIRECTS = 10
_PATIENCE = struct.pack("ll", 0, 50_000)
"""struct timeval of SO_RCVTIMEO: what came within 50 ms is handed on even if it is not all that was asked for."""
PRIVATE_HEADERS = frozenset({"authorization", "cookie", "x-amz-security-token", "x-goog-api-key"})
"""Lower-case names of headers that carry credentials: for the first URL's host only."""


class TransportError(Exception):
    """The network failed: a name, connection, TLS handshake or response that does not come or make sense.

    Attributes:
        silent_seconds: How long was waited in vain for a byte; 0 if it failed for another reason.
    """

    def __init__(self, message: str, *, silent_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.silent_seconds = silent_seconds


class Body(Protocol):
    """The bytes of one answer."""

    def read_into(self, buffer: memoryview) -> int:
        """Bytes put at the buffer's start: at least one, or 0 at the end. Raises TransportError."""
        ...

    def close(self) -> None:
        """Give up what is left, or keep the connection if nothing is."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and headers of a response, and its body.

    Attributes:
        status: HTTP status.
        headers: Lower-case names.
        url: Where the answer came from, after redirects. May carry a signature: never log it.
        body: To be closed.
    """

    status: int
    headers: Mapping[str, str]
    url: str
    body: Body


class _HttpBody:
    def __init__(
        self, transport: "HttpTransport", connection: "_Connection", response: http.client.HTTPResponse
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._response = response
        self._left = None if response.chunked else response.length
        self._direct: socket.socket | None = None

    def read_into(self, buffer: memoryview) -> int:
        if self._left == 0:
            return 0
        try:
            if self._left is None:
                return self._response.readinto(buffer)
            count = self._receive(buffer[: self._left])
        except TimeoutError:
            silent = self._transport.read_timeout
            raise TransportError(f"no byte came for {silent:.0f} s", silent_seconds=silent) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"the connection broke ({_describe(error)})") from None
        if count == 0:
            raise TransportError(f"the connection was closed {self._left} bytes before the end")
        self._left -= count
        return count

    def _receive(self, buffer: memoryview) -> int:
        if self._direct is None:
            # The reader behind the response may hold the body's first bytes, but none once it has been asked for more
            # than it holds. readinto1 returns what has arrived; readinto would lose it on a timeout.
            count: int = self._response.fp.readinto1(buffer)
            self._direct = self._connection.receive_directly()
            return count
        if isinstance(self._direct, ssl.SSLSocket):
            return self._direct.recv_into(buffer)
        waited_from = time.monotonic()
        while True:
            try:
                # One system call for a whole piece, and for less if it does not come in time.
                return self._direct.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            except BlockingIOError:
                if time.monotonic() - waited_from >= self._transport.read_timeout:
                    raise TimeoutError from None

    def close(self) -> None:
        whole = self._left == 0 if self._left is not None else self._response.isclosed()
        keep = whole and not self._response.will_close
        self._response.close()
        self._transport.release(self._connection, keep=keep)


class _Connection(http.client.HTTPConnection):
    """One connection to a host, perhaps through a proxy; HTTPConnection's parts are enough for both schemes."""

    def __init__(
        self, target: SplitResult, proxy: SplitResult | None, tls: ssl.SSLContext | None, timeout: float
    ) -> None:
        default = 443 if target.scheme == "https" else 80
        self._target_host, self._target_port = target.hostname or "", target.port or default
        self._tls = tls
        self.connected = False
        # http.client lets go of its socket when the server is going to close the connection after the answer.
        self.stream: socket.socket | None = None
        self.absolute_urls = proxy is not None and tls is None
        self.proxy_headers: dict[str, str] = {}
        if proxy is None:
            super().__init__(self._target_host, self._target_port, timeout=timeout)
            return
        super().__init__(proxy.hostname or "", proxy.port or 80, timeout=timeout)
        if proxy.username is not None:
            login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            self.proxy_headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        if tls is not None:
            self.set_tunnel(self._target_host, self._target_port, headers=self.proxy_headers)

    def connect(self) -> None:
        super().connect()
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._target_host)
        self.stream = self.sock
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)

    def wait_at_most(self, seconds: float) -> None:
        """Fail when the answer's head does not come for so long."""
        if self.stream is not None:
            self.stream.settimeout(seconds)

    def receive_directly(self) -> socket.socket:
        """The socket, for reading the body without the reader that http.client puts before it.

        Python's own timeouts cost a poll for each read. Without TLS the kernel's timeout does the same, and a read for
        which it runs out returns what came so far.
        """
        if self.stream is None:
            raise http.client.NotConnected
        if self._tls is None:
            self.stream.settimeout(None)
        return self.stream


class HttpTransport:
    """A pool of connections, shared by all workers of a fetch. Thread-safe.

    Args:
        connect_timeout: Seconds to connect.
        read_timeout: Seconds without a byte after which a read fails.
    """

    def __init__(self, *, connect_timeout: float, read_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self._proxies = urllib.request.getproxies_environment()
        self._lock = threading.Lock()
        self._idle: defaultdict[tuple[str, str], list[_Connection]] = defaultdict(list)
        self._busy: set[_Connection] = set()
        self._keys: dict[_Connection, tuple[str, str]] = {}
        self._closed = False

    def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """GET, following redirects; headers that carry credentials stay on the first URL's host.

        Raises:
            TransportError: There is no answer.
            FetchError: A redirect would give up encryption.
        """
        origin = _origin(url)
        for _ in range(MAX_REDIRECTS):
            own = _origin(url) == origin
            sent = {name: value for name, value in headers.items() if own or name.lower() not in PRIVATE_HEADERS}
            answer = self._ask(url, sent)
            location = answer.headers.get("location")
            if answer.status not in {301, 302, 303, 307, 308} or location is None:
                return answer
            answer.body.close()
            target = urljoin(url, location)
            if urlsplit(target).scheme not in {"http", "https"}:
                raise TransportError("the answer redirects to something that is no http(s) address")
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
                text = (
                    f"{host_of(url)} redirects from https to unprotected http at {host_of(target)}, which is refused."
                )
                raise FetchError(Reason.INVALID_SOURCE, text)
            url = target
        raise TransportError(f"{host_of(url)} redirects more than {MAX_REDIRECTS} times")

    def release(self, connection: _Connection, *, keep: bool) -> None:
        """Take a connection back."""
        with self._lock:
            self._busy.discard(connection)
            keep = keep and not self._closed
            if keep:
                self._idle[self._keys[connection]].append(connection)
            else:
                self._keys.pop(connection, None)
        if not keep:
            connection.close()

    def close(self) -> None:
        """Close everything; threads that are blocked in a read get a TransportError."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
            busy = list(self._busy)
        for connection in idle:
            connection.close()
        for connection in busy:
            # Closing a socket does not wake a thread that reads from it; shutting it down does.
            if connection.stream is not None:
                with contextlib.suppress(OSError):
                    connection.stream.shutdown(socket.SHUT_RDWR)

    def _ask(self, url: str, headers: Mapping[str, str]) -> Answer:
        target = urlsplit(url)
        while True:
            connection, reused = self._take(target)
            try:
                response = self._exchange(connection, target, headers)
            except TimeoutError:
                self.release(connection, keep=False)
                waited = self.read_timeout if connection.connected else 0.0
                what = "no answer came" if connection.connected else "the connection could not be made in time"
                raise TransportError(f"{what} from {host_of(url)}", silent_seconds=waited) from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                self.release(connection, keep=False)
                # A kept connection that the server has closed in the meantime says nothing about the server.
                if reused and isinstance(error, ConnectionError):
                    continue
                raise TransportError(f"{host_of(url)} cannot be reached ({_describe(error)})") from None
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, url, _HttpBody(self, connection, response))

    def _exchange(
        self, connection: _Connection, target: SplitResult, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        if connection.sock is None:
            connection.timeout = self._connect_timeout
            connection.connect()
            connection.connected = True
        connection.wait_at_most(self.read_timeout)
        path = target.path or "/"
        if target.query:
            path = f"{path}?{target.query}"
        if connection.absolute_urls:
            path = f"http://{target.netloc}{path}"
            headers = {**headers, **connection.proxy_headers}
        connection.request("GET", path, headers={"Host": target.netloc.rpartition("@")[2], **headers})
        return connection.getresponse()

    def _take(self, target: SplitResult) -> tuple[_Connection, bool]:
        key = (target.scheme, target.netloc)
        with self._lock:
            if self._closed:
                raise TransportError("the fetch was stopped")
            if self._idle[key]:
                connection = self._idle[key].pop()
                self._busy.add(connection)
                return connection, True
            tls = _tls_context() if target.scheme == "https" else None
            connection = _Connection(target, self._proxy_for(target), tls, self._connect_timeout)
            self._busy.add(connection)
            self._keys[connection] = key
            return connection, False

    def _proxy_for(self, target: SplitResult) -> SplitResult | None:
        proxy = self._proxies.get(target.scheme) or self._proxies.get("all")
        host = target.netloc.rpartition("@")[2]
        if not proxy or self._bypassed(host):
            return None
        parsed = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parsed.scheme != "http":
            raise TransportError(f"the proxy scheme {parsed.scheme!r} is not supported; use an http:// proxy")
        return parsed

    def _bypassed(self, host: str) -> bool:
        # urllib applies NO_PROXY as most programs do; typeshed does not list this function.
        bypass: Callable[[str, dict[str, str]], bool] = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
        return bool(bypass(host, self._proxies))


class LocalBody:
    """A range of a local file, which must stay as it was planned while it is read."""

    def __init__(self, location: LocalLocation, name: str, start: int, end: int) -> None:
        self._location, self._name = location, name
        self._position, self._end = start, end
        try:
            self._fd = os.open(location.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceChangedError(name, f"{name} can no longer be opened ({error.strerror}).") from None
        self._check()

    def read_into(self, buffer: memoryview) -> int:
        """Bytes put at the buffer's start; 0 at the range's end."""
        count = os.preadv(self._fd, [buffer[: self._end - self._position]], self._position)
        self._check()
        if count == 0 and self._position < self._end:
            raise SourceChangedError(self._name, f"{self._name} became shorter while it was read.")
        self._position += count
        return count

    def close(self) -> None:
        """Close the file; its pages are not needed again."""
        os.posix_fadvise(self._fd, 0, self._position, os.POSIX_FADV_DONTNEED)
        os.close(self._fd)

    def _check(self) -> None:
        if LocalLocation.identity_of(os.fstat(self._fd)) != self._location.identity:
            raise SourceChangedError(self._name, f"{self._name} was changed while it was read.")


def host_of(url: str) -> str:
    """Host and port of a URL, for messages: without user, path and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # ssl reads SSL_CERT_FILE and SSL_CERT_DIR itself; the other two are what programs built on requests know.
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(name):
            return ssl.create_default_context(cafile=path)
    return ssl.create_default_context()


def _describe(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is not trusted: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
