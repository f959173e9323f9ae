"""One HTTP connection: requests in, replies out, a file's bytes straight from the cache."""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus

from modelcache_server.errors import RequestError, as_request_error
from modelcache_server.http_message import BadRequest, Request, parse_request
from modelcache_server.reader import BlockReader, Loan
from modelcache_server.settings import HttpLimits
from modelcache_server.store import ServedFile
from modelcache_server.streams import Stream
from modelcache_volume import BLOCK_BYTES

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_run_id = secrets.token_hex(4)
_counter = itertools.count(1)


def new_request_id() -> str:
    """An id for a request that came without one; unique among replicas and restarts."""
    return f"{_run_id}-{next(_counter)}"


def accepted_request_id(given: str | None) -> str:
    """The caller's request id if it is harmless to log, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else new_request_id()


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file as a reply's body."""

    file: ServedFile
    offset: int
    length: int


@dataclass(frozen=True)
class Reply:
    """An answer; `length` is Content-Length, also of an answer to HEAD.

    Attributes:
        status: HTTP status.
        headers: without those that the connection adds (Date, Content-Length, Connection, X-Request-Id).
        body: bytes, or a part of a file.
        error: the reason's name, for logs and metrics; empty for a success.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | FilePart = b""
    error: str = ""

    @property
    def length(self) -> int:
        """Size of the body in bytes."""
        return self.body.length if isinstance(self.body, FilePart) else len(self.body)


@dataclass(frozen=True)
class Served:
    """What became of a request, for logs and metrics."""

    lane: str
    method: str
    target: str
    status: str
    error: str
    sent_bytes: int
    seconds: float
    client: str
    request_id: str


App = Callable[[Request, str], Reply]
"""Answers a request of a client (its address); raises what `as_request_error` understands."""


def error_reply(error: RequestError) -> Reply:
    """The answer that tells a client what went wrong."""
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("X-Error-Code", error.info.http_code)]
    message = str(error)
    # Header values are Latin-1 without line breaks; the whole sentence is in the body.
    headers.append(("X-Error-Message", re.sub(r"[^\x20-\x7e]", " ", message)))
    if error.retry_after is not None:
        headers.append(("Retry-After", str(max(1, round(error.retry_after)))))
    if error.info.http_status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    return Reply(error.info.http_status, tuple(headers), f"{message}\n".encode(), error.reason)


class CutConnection(Exception):
    """The connection must be closed now: what would follow is not what was announced."""


class HttpConnection:
    """Serves one client's connection in one thread, until it is closed, idle, broken or told to stop."""

    def __init__(
        self,
        stream: Stream,
        client: str,
        app: App,
        reader: BlockReader | None,
        limits: HttpLimits,
        observe: Callable[[Served], None],
        *,
        lane: str,
    ) -> None:
        self._stream = stream
        self._client = client
        self._app = app
        self._reader = reader
        self._limits = limits
        self._observe = observe
        self._lane = lane
        self._buffer = b""
        self._sent = 0
        self.stopping = False

    def serve(self) -> None:
        """Answer requests. Raises OSError when the client is gone."""
        keep = True
        while keep and not self.stopping:
            try:
                head = self._read_head()
                if head is None:
                    return
                request = parse_request(head)
                if request.body_length:
                    request = replace(request, body=self._read_body(request.body_length))
            except BadRequest as error:
                self._answer_bad(error)
                return
            keep = self._answer(request)
        self._stream.shut()

    def _read_head(self) -> bytes | None:
        """The next request's head; None when the client closed or stays silent."""
        deadline = 0.0
        while True:
            while self._buffer.startswith(b"\r\n"):
                self._buffer = self._buffer[2:]
            end = self._buffer.find(b"\r\n\r\n")
            if end > self._limits.header_bytes or (end < 0 and len(self._buffer) > self._limits.header_bytes):
                raise BadRequest(431, f"The headers are longer than {self._limits.header_bytes} bytes.")
            if end >= 0:
                head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
                return head
            if self._buffer and not deadline:
                deadline = time.monotonic() + self._limits.header_seconds
            left = deadline - time.monotonic() if deadline else self._limits.idle_seconds
            try:
                data = self._stream.receive(max(left, 0.001))
            except TimeoutError:
                if not self._buffer:
                    return None
                raise BadRequest(408, "The request did not arrive in time.") from None
            if deadline and time.monotonic() > deadline:
                raise BadRequest(408, "The request did not arrive in time.")
            if not data:
                return None
            self._buffer += data

    def _read_body(self, length: int) -> bytes:
        deadline = time.monotonic() + self._limits.header_seconds
        while len(self._buffer) < length:
            try:
                data = self._stream.receive(max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                data = b""
            if not data or time.monotonic() > deadline:
                raise BadRequest(408, "The request's body did not arrive in time.")
            self._buffer += data
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return body

    def _answer(self, request: Request) -> bool:
        """Answer one request; False when the connection must not be used further."""
        start = time.perf_counter()
        self._sent = 0
        request_id = accepted_request_id(request.headers.get("x-request-id"))
        keep = request.keep_alive
        reply = self._ask(request)
        error = reply.error
        try:
            try:
                self._send(request, reply, request_id, keep=keep and not self.stopping)
            except CutConnection:
                raise
            except Exception as failure:
                # Nothing was sent yet, so the failure can still be told.
                known = as_request_error(failure)
                if known is None or self._sent or isinstance(failure, ConnectionError):
                    raise
                reply = error_reply(known)
                error = reply.error
                self._send(request, reply, request_id, keep=keep and not self.stopping)
        except CutConnection as cut:
            error = str(cut)
            keep = False
            raise
        except OSError:
            error = "CLIENT_GONE"
            raise
        finally:
            self._observe(
                Served(
                    self._lane,
                    request.method,
                    request.path,
                    str(reply.status),
                    error,
                    self._sent,
                    time.perf_counter() - start,
                    self._client,
                    request_id,
                )
            )
        return keep

    def _ask(self, request: Request) -> Reply:
        try:
            return self._app(request, self._client)
        except Exception as failure:  # noqa: BLE001 - every failure becomes an answer
            known = as_request_error(failure)
            if known is None:
                _log.exception("request failed path=%s", request.path)
                return Reply(500, (("X-Error-Code", "Internal"),), b"internal error\n", "INTERNAL")
            return error_reply(known)

    def _answer_bad(self, error: BadRequest) -> None:
        headers = [("Content-Type", "text/plain")]
        if error.status == 405:
            headers.append(("Allow", "GET, HEAD"))
        reply = Reply(error.status, tuple(headers), f"{error}\n".encode(), "BAD_REQUEST")
        self._sent = 0
        self._observe(
            Served(self._lane, "-", "-", str(error.status), reply.error, 0, 0.0, self._client, new_request_id())
        )
        self._send_bytes(self._head(reply, "", keep=False) + f"{error}\n".encode())
        self._stream.shut()
        # Closing while the client still sends would reset the connection, and the answer would be lost.
        deadline = time.monotonic() + 1.0
        try:
            for _ in range(16):
                if time.monotonic() > deadline or not self._stream.receive(1.0):
                    return
        except TimeoutError:
            return

    def _send(self, request: Request, reply: Reply, request_id: str, *, keep: bool) -> None:
        head = self._head(reply, request_id, keep=keep)
        if request.method == "HEAD" or not reply.length:
            self._send_bytes(head)
        elif isinstance(reply.body, FilePart):
            self._send_file(head, reply.body)
        else:
            self._send_bytes(head + reply.body)

    @staticmethod
    def _head(reply: Reply, request_id: str, *, keep: bool) -> bytes:
        lines = [_STATUS_LINES[reply.status], f"Date: {_date(int(time.time()))}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in reply.headers]
        if reply.status != 304:
            lines.append(f"Content-Length: {reply.length}\r\n")
        if request_id:
            lines.append(f"X-Request-Id: {request_id}\r\n")
        lines.append("Connection: keep-alive\r\n\r\n" if keep else "Connection: close\r\n\r\n")
        return "".join(lines).encode("latin-1")

    def _send_bytes(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._send_some([left]) :]
        self._finish()

    def _send_file(self, head: bytes, part: FilePart) -> None:
        """Send head and bytes. While the reader takes nothing, this holds neither a block nor a share of the budget."""
        if self._reader is None:
            raise AssertionError("this lane has no files")
        offset, end = part.offset, part.offset + part.length
        horizon = self._reader.horizon(part.file, offset, part.length)
        unsent = memoryview(head)
        while offset < end:
            length = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES) - offset
            with self._borrow(part.file, offset, length, horizon) as loan:
                sent = self._stream.send([unsent, loan.view] if unsent else [loan.view])
            self._sent += sent
            if sent < len(unsent) + length:
                self._await_reader()
            of_head = min(sent, len(unsent))
            unsent = unsent[of_head:]
            offset += sent - of_head
        self._finish()

    def _borrow(self, file: ServedFile, offset: int, length: int, horizon: int) -> Loan:
        """As `BlockReader.lend`; once bytes were sent, an error can only cut the connection."""
        if self._reader is None:
            raise AssertionError("this lane has no files")
        try:
            return self._reader.lend(file, offset, length, client=self._client, horizon=horizon)
        except Exception as failure:
            known = as_request_error(failure)
            if known is None or not self._sent:
                raise
            _log.warning("read cut path=%s at=%d reason=%s: %s", file.path, offset, known.reason, known)
            raise CutConnection(known.reason) from failure

    def _send_some(self, parts: list[memoryview]) -> int:
        sent = self._stream.send(parts)
        self._sent += sent
        if sent < sum(map(len, parts)):
            self._await_reader()
        return sent

    def _finish(self) -> None:
        """Let the reader take what the stream still holds."""
        while self._stream.unfinished:
            self._await_reader()
            self._stream.send([])

    def _await_reader(self) -> None:
        if not self._stream.writable(self._limits.stall_seconds):
            raise CutConnection("STALLED_READER")


_last_date = (0, "")


def _date(second: int) -> str:
    global _last_date  # noqa: PLW0603 - one string a second, whichever thread makes it
    if _last_date[0] != second:
        _last_date = (second, formatdate(second, usegmt=True))
    return _last_date[1]


def without_body(reply: Reply, status: int) -> Reply:
    """The same headers under another status, and no body."""
    return replace(reply, status=status, body=b"")
