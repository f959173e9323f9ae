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
from modelcache_server.http_message import BadRequest, BodyWanted, Request, parse_request
from modelcache_server.reader import BlockReader, Loan
from modelcache_server.settings import HttpLimits
from modelcache_server.store import ServedFile
from modelcache_server.streams import Stream
from modelcache_volume import BLOCK_BYTES

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_LINGER_SECONDS = 0.2
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
"""Answers a request of a client (its address); raises what `as_request_error` understands, and what `content` does.

A request with a body is asked about as soon as its head is here, and once more if the answer wants the body.
"""


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
    """Serves one client's connection, one thread at a time, until it is closed, idle, broken or told to stop.

    Attributes:
        deadline: when to stop waiting for a request, or for the rest of one (time.monotonic).
        stopping: answer no further request.
    """

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
        self._begun = False  # a request, of which a part is here
        self._waits_for_body: Request | None = None
        self._of_file = False
        self._step_aside: Callable[[], None] | None = None
        self.deadline = time.monotonic() + limits.idle_seconds
        self.stopping = False

    def serve(self, step_aside: Callable[[], None] | None = None) -> bool:
        """Answer requests. Raises OSError when the client is gone.

        Args:
            step_aside: for a thread that has other connections to serve: is called before anything that may take
                long. Without it, the thread waits for each request.

        Returns:
            Whether to call again once there is more to read, or the deadline is over; False: this is the end.
        """
        self._step_aside = step_aside
        patience = 0.0
        answered = False
        while not self.stopping:
            try:
                request = self._take_request()
                if request is None:
                    if step_aside and answered and not patience:
                        return True
                    data = self._receive(patience)
                    if not data:
                        return data is None
                    self._buffer += data
                    continue
                self._of_file = False
                try:
                    kept = self._answer(request)
                except BodyWanted:
                    self._await_body(request)
                    continue
            except BadRequest as error:
                self._answer_bad(error)
                return False
            if not kept:
                if request.body is None:
                    self._long()
                    self._end()
                    return False
                break
            answered = True
            self.deadline = time.monotonic() + self._limits.idle_seconds
            # Who reads range after range is served by the same thread, without waiting for a turn.
            patience = _LINGER_SECONDS if self._of_file else 0.0
        self._stream.shut()
        return False

    def _take_request(self) -> Request | None:
        """The next request, without its body unless that is wanted; None while it is not all here."""
        if self._waits_for_body is None:
            self._buffer = self._buffer.removeprefix(b"\r\n")  # RFC 9112, 2.2: one is to be forgiven
            end = self._buffer.find(b"\r\n\r\n")
            if end > self._limits.header_bytes or (end < 0 and len(self._buffer) > self._limits.header_bytes):
                raise BadRequest(431, f"The headers are longer than {self._limits.header_bytes} bytes.")
            if end < 0:
                if self._buffer and not self._begun:
                    self._begin()
                return None
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._begun = False
            return parse_request(head)
        request = self._waits_for_body
        length = request.body_length or 0
        if len(self._buffer) < length:
            return None
        self._begun, self._waits_for_body = False, None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return replace(request, body=body)

    def _await_body(self, request: Request) -> None:
        self._begin()
        self._waits_for_body = request
        if "expect" in request.headers and not self._buffer:
            self._send_bytes(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _begin(self) -> None:
        self._begun = True
        self.deadline = time.monotonic() + self._limits.header_seconds

    def _receive(self, patience: float) -> bytes | None:
        """Some bytes; empty when the client closed or stays silent; None when none came within `patience`."""
        left = self.deadline - time.monotonic()
        if left > 0:
            try:
                return self._stream.receive(min(left, patience) if self._step_aside else left)
            except TimeoutError:
                if self._step_aside and time.monotonic() < self.deadline:
                    return None
        if self._begun:
            raise BadRequest(408, "The request did not arrive in time.")
        return b""

    def _long(self) -> None:
        if self._step_aside:
            self._step_aside()

    def _answer(self, request: Request) -> bool:
        """Answer one request; False when the connection must not be used further."""
        start = time.perf_counter()
        self._sent = 0
        request_id = accepted_request_id(request.headers.get("x-request-id"))
        # A body that was not read could be taken for the next request.
        keep = request.keep_alive and request.body is not None
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
        except (BadRequest, BodyWanted):
            raise
        except Exception as failure:  # noqa: BLE001 - every failure becomes an answer
            known = as_request_error(failure)
            if known is None:
                _log.exception("request failed path=%s", request.path)
                return Reply(500, (("X-Error-Code", "Internal"),), b"internal error\n", "INTERNAL")
            return error_reply(known)

    def _answer_bad(self, error: BadRequest) -> None:
        reply = Reply(error.status, (("Content-Type", "text/plain"),), f"{error}\n".encode(), "BAD_REQUEST")
        self._sent = 0
        self._observe(
            Served(self._lane, "-", "-", str(error.status), reply.error, 0, 0.0, self._client, new_request_id())
        )
        self._long()
        self._send_bytes(self._head(reply, "", keep=False) + f"{error}\n".encode())
        self._end()

    def _end(self) -> None:
        """Close while the client may still send: that would reset the connection, and the answer would be lost."""
        self._stream.shut()
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
        self._of_file = True
        self._long()
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
        self._long()
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
