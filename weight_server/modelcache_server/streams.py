"""Byte streams of one connection: blocking sockets whose sends and receives are bounded in time by the kernel.

A Python-level timeout would make the socket non-blocking and cut every send to what fits the socket's buffer; with
SO_SNDTIMEO one `sendmsg` takes a whole 4 MiB block and comes back early only when the reader is slow.
"""

import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

Bytes = bytes | memoryview
_RECEIVE_BYTES = 64 * 1024
# Measured: larger plaintext pieces gain nothing, smaller ones pay more calls (OpenSSL's records are 16 KiB anyway).
_TLS_PIECE_BYTES = 96 * 1024


class Stream(Protocol):
    """What a connection reads and writes."""

    def receive(self, seconds: float) -> bytes:
        """Some bytes; empty at the end. Raises TimeoutError when none came in time."""

    def send(self, parts: Sequence[Bytes]) -> int:
        """Take bytes from the beginning of `parts`; returns how many, fewer when the reader is slow."""

    def writable(self, seconds: float) -> bool:
        """Wait until the reader takes more; False when it does not in time."""

    @property
    def unfinished(self) -> bool:
        """Whether bytes that `send` took still wait here: then `send` must be called again, with nothing if need be."""

    def shut(self) -> None:
        """Say that nothing more will be sent."""


class PlainStream:
    """TCP without encryption.

    Attributes:
        send_seconds: how long one `send` may take.
    """

    def __init__(self, sock: socket.socket, *, send_seconds: float) -> None:
        """Wrap a connected socket; one `send` takes at most `send_seconds`."""
        self._sock = sock
        self.send_seconds = send_seconds
        self._receive_seconds = -1.0
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(send_seconds))

    def receive(self, seconds: float) -> bytes:
        """As Stream.receive; with 0 seconds what is here already."""
        if seconds and seconds != self._receive_seconds:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
            self._receive_seconds = seconds
        try:
            return self._sock.recv(_RECEIVE_BYTES, 0 if seconds else socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise TimeoutError from None

    def send(self, parts: Sequence[Bytes]) -> int:
        """As Stream.send: one sendmsg."""
        try:
            return self._sock.sendmsg(parts)
        except BlockingIOError:
            return 0

    def writable(self, seconds: float) -> bool:
        """As Stream.writable."""
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    @property
    def unfinished(self) -> bool:
        """As Stream.unfinished: the kernel has all of it."""
        return False

    def shut(self) -> None:
        """As Stream.shut."""
        self._sock.shutdown(socket.SHUT_WR)


class TlsStream:
    """TLS over a PlainStream, through memory buffers: faster than SSLSocket, and with the kernel's timeouts."""

    def __init__(self, plain: PlainStream, context: ssl.SSLContext, *, handshake_seconds: float) -> None:
        """Shake hands; raises ssl.SSLError, TimeoutError or ConnectionError."""
        self._plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = memoryview(b"")
        deadline = time.monotonic() + handshake_seconds
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush_fully(deadline)
                self._feed(deadline)
            else:
                self._flush_fully(deadline)
                return

    def receive(self, seconds: float) -> bytes:
        """As Stream.receive."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._tls.read(_RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                self._flush_fully(deadline)  # an answer to a key update
                if not self._feed(deadline):
                    return b""
            except ssl.SSLZeroReturnError:
                return b""

    def send(self, parts: Sequence[Bytes]) -> int:
        """As Stream.send; what was encrypted counts as taken and goes out first the next time."""
        if not self._flush():
            return 0
        taken = 0
        # Each piece may wait for the reader: only one limit for all keeps a slow one from holding a block for long.
        deadline = time.monotonic() + self._plain.send_seconds
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _TLS_PIECE_BYTES):
                taken += self._tls.write(view[start : start + _TLS_PIECE_BYTES])
                if not self._flush() or time.monotonic() > deadline:
                    return taken
        return taken

    def writable(self, seconds: float) -> bool:
        """As Stream.writable."""
        return self._plain.writable(seconds)

    @property
    def unfinished(self) -> bool:
        """As Stream.unfinished: encrypted bytes that the reader did not take."""
        return bool(self._unsent)

    def shut(self) -> None:
        """As Stream.shut: the close alert first, so that the reader knows that nothing was cut off."""
        with suppress(ssl.SSLError):  # it wants the peer's alert too; ours is written
            self._tls.unwrap()
        self._flush()
        self._plain.shut()

    def _flush(self) -> bool:
        """Send what is encrypted; False when the reader took only a part of it."""
        if not self._unsent:
            self._unsent = memoryview(self._outgoing.read())
        while self._unsent:
            sent = self._plain.send([self._unsent])
            if not sent:
                return False
            self._unsent = self._unsent[sent:]
        return True

    def _flush_fully(self, deadline: float) -> None:
        while not self._flush():
            if time.monotonic() > deadline:
                raise TimeoutError

    def _feed(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        data = self._plain.receive(left)
        if data:
            self._incoming.write(data)
        elif not self._tls.version():
            raise ConnectionError("the peer left during the TLS handshake")
        return bool(data)


def timeval(seconds: float) -> bytes:
    """The value of SO_RCVTIMEO and SO_SNDTIMEO."""
    # A timeout of zero would mean none.
    microseconds = max(1, int(seconds * 1_000_000))
    return struct.pack("@ll", microseconds // 1_000_000, microseconds % 1_000_000)
