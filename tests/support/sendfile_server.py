"""A small threaded HTTP/1.1 server that sends ranges of files by sendfile and misbehaves on demand.

The fake hub and the benches stand on it: what it costs to serve is a system call per 4 MiB, so that the client is what
gets measured, and every fault a real server shows can be asked for by path and count.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

SEND_BYTES = 4 * 2**20


@dataclass
class Fault:
    """Something that goes wrong with the requests whose path matches.

    Attributes:
        match: Shell wildcards on the decoded URL path, such as ``*/model.safetensors``.
        times: How many requests it spoils; -1 for all.
        skip: How many matching requests pass before the first one is spoilt.
        status: Answer with this status instead.
        headers: Headers of that answer.
        cut_after: Close the connection after this many body bytes.
        stall_after: Send nothing more after this many body bytes, until the server stops.
        corrupt_at: Flip the lowest bit of the byte at this offset of the file.
        bytes_per_second: Send no faster than this.
        delay: Seconds to wait before answering.
        ignore_range: Answer 200 with the whole file although a range was asked for.
    """

    match: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    stall_after: int | None = None
    corrupt_at: int | None = None
    bytes_per_second: float | None = None
    delay: float = 0.0
    ignore_range: bool = False
    hits: int = 0


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    host: str


class Ledger:
    """What the servers of one test saw and sent, and the faults still due. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Seen] = []
        self._sent: dict[str, int] = {}
        self._faults: list[Fault] = []
        self._down = threading.Event()

    def add_fault(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def take_fault(self, path: str) -> Fault | None:
        """The fault due for a request of this path, if one is."""
        with self._lock:
            for fault in self._faults:
                if not fnmatch.fnmatchcase(path, fault.match):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.times == 0:
                    continue
                fault.times -= fault.times > 0
                fault.hits += 1
                return fault
        return None

    def saw(self, request: Seen) -> None:
        with self._lock:
            self._requests.append(request)

    def sent(self, path: str, count: int) -> None:
        with self._lock:
            self._sent[path] = self._sent.get(path, 0) + count

    def reset(self) -> None:
        """Forget requests and counted bytes."""
        with self._lock:
            self._requests.clear()
            self._sent.clear()

    @property
    def requests(self) -> list[Seen]:
        with self._lock:
            return list(self._requests)

    def bytes_sent(self, match: str = "*") -> int:
        """File bytes handed to the kernel for paths that match."""
        with self._lock:
            return sum(count for path, count in self._sent.items() if fnmatch.fnmatchcase(path, match))

    def stop(self) -> None:
        self._down.set()

    def wait(self, seconds: float) -> bool:
        """Wait, but not longer than the server runs; True when it is stopping."""
        return self._down.wait(seconds)


class FileHandler(BaseHTTPRequestHandler):
    """Sends files; subclasses route requests to ``send_file`` and ``send_text``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    ledger: ClassVar[Ledger]
    _fault: Fault | None = None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: tests read the ledger."""

    def route(self, path: str, query: str) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.ledger.saw(
            Seen(self.command, path, parts.query, {k.lower(): v for k, v in self.headers.items()}, self.headers["Host"])
        )
        fault = self._fault = self.ledger.take_fault(path)
        with contextlib.suppress(ConnectionError, TimeoutError):
            if fault is not None and fault.delay and self.ledger.wait(fault.delay):
                self.close_connection = True
                return
            if fault is not None and fault.status is not None:
                self.send_text(fault.status, "as the test wishes", fault.headers)
                return
            self.route(path, parts.query)

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815

    def send_text(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, source: Path, headers: dict[str, str], *, count_as: str | None = None) -> None:
        """Answer GET and HEAD of a file, with a single Range if asked for, spoilt by the fault that is due."""
        size = source.stat().st_size
        start, end, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not (self._fault and self._fault.ignore_range):
            start = int(wanted[1])
            end = min(size, int(wanted[2]) + 1 if wanted[2] else size)
            status = 206
            if start >= size:
                self.send_text(416, "", {"Content-Range": f"bytes */{size}"})
                return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        with source.open("rb") as file:
            self._send_bytes(file.fileno(), start, end, count_as or unquote(urlsplit(self.path).path))

    def _send_bytes(self, fd: int, start: int, end: int, name: str) -> None:
        fault = self._fault or Fault("")
        position, began = start, time.monotonic()
        while position < end:
            stop = self._next_stop(fault, start, position, end)
            if stop <= position:
                if fault.stall_after is not None:
                    self.ledger.wait(600)
                self._hang_up()
                return
            if position == fault.corrupt_at:
                self.connection.sendall(bytes([os.pread(fd, 1, position)[0] ^ 1]))
                count = 1
            else:
                count = os.sendfile(self.connection.fileno(), fd, position, stop - position)
            self.ledger.sent(name, count)
            position += count
            if fault.bytes_per_second is not None:
                ahead = (position - start) / fault.bytes_per_second - (time.monotonic() - began)
                if ahead > 0 and self.ledger.wait(ahead):
                    self._hang_up()
                    return

    def _next_stop(self, fault: Fault, start: int, position: int, end: int) -> int:
        """Up to where the next system call may send."""
        # A slow network trickles: one large step would be counted as sent to a client that has just been killed.
        step = SEND_BYTES if fault.bytes_per_second is None else max(4096, int(fault.bytes_per_second / 100))
        stop = min(end, position + step)
        for limit in (fault.cut_after, fault.stall_after):
            if limit is not None:
                stop = min(stop, start + limit)
        if fault.corrupt_at is not None and position <= fault.corrupt_at:
            stop = min(stop, max(fault.corrupt_at, position + 1))
        return stop

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[FileHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what many tests are about."""

    def close_all(self) -> None:
        self.shutdown()
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Served:
    """A handler class served on an ephemeral loopback port until ``stop``."""

    def __init__(self, handler: type[FileHandler], ledger: Ledger, **attributes: object) -> None:
        bound = type(handler.__name__, (handler,), {"ledger": ledger, **attributes})
        self._server = _Server(bound)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.close_all()
        self._thread.join(5)


class _FolderHandler(FileHandler):
    root: ClassVar[Path]

    def route(self, path: str, query: str) -> None:
        file = self.root / path.lstrip("/")
        if ".." in path or not file.is_file():
            self.send_text(404, "no such file")
            return
        self.send_file(file, {"ETag": '"fixed"'})


@contextlib.contextmanager
def serve_folder(root: Path):
    """Serve the files of a folder; yields (base URL, ledger)."""
    ledger = Ledger()
    served = Served(_FolderHandler, ledger, root=root)
    try:
        yield served.url, ledger
    finally:
        ledger.stop()
        served.stop()
