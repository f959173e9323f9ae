"""Bytes of one connection to a weight server: plain TCP, or TLS through memory buffers.

Blocking sockets with ``SO_RCVTIMEO`` keep ``MSG_WAITALL`` working (Python's own timeouts make a socket non-blocking),
so megabytes are one system call, made without the interpreter lock.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from typing import Any, Final, Protocol

__all__ = ["PlainTransport", "TlsTransport", "Transport"]

# A receiver that is woken for each 64 KiB segment spends a quarter more CPU than one that is woken for each of these.
_WAKE_BYTES: Final = 2**20
_TLS_RECEIVE_BYTES: Final = 512 * 2**10
# So much of a record, header and tag included, may be here already while its text is still to come (RFC 8446, 5.2).
_TLS_RECORD_BYTES: Final = 5 + 2**14 + 256
# Another time limit is not worth a system call if the one that is set is as near as this.
_NEAR: Final = 0.1


class Transport(Protocol):
    """What the HTTP lane sends its requests over. Calls that take too long raise BlockingIOError, others OSError."""

    def limit(self, seconds: float) -> None:
        """Bounds each wait for the peer from now on, give or take a tenth."""

    def send(self, data: bytes) -> None:
        """Sends all of it."""

    def receive(self, most: int) -> bytes:
        """Receives some bytes; none at the connection's end."""

    def receive_into(self, view: memoryview, coming: int) -> int:
        """Receives up to ``len(view)`` bytes, at least one; 0: the connection ended.

        Args:
            view: where to.
            coming: how many bytes the peer is about to send, at least ``len(view)``: so many may be waited for.
        """

    def abort(self) -> None:
        """Breaks the connection from another thread: who waits for it returns."""

    def close(self) -> None:
        """Closes the connection."""


class PlainTransport:
    """TCP without encryption.

    Args:
        address: IP address and port.
        seconds: for which it may take to connect.

    Raises:
        OSError: nobody listens there, or does not answer.
    """

    def __init__(self, address: tuple[str, int], seconds: float) -> None:
        self._socket = socket.create_connection(address, timeout=seconds)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._seconds = 0.0
        self._wakes_at = 1

    def limit(self, seconds: float) -> None:
        """As Transport.limit."""
        if abs(seconds - self._seconds) <= _NEAR * seconds:
            return
        timeval = struct.pack("@ll", *divmod(max(1, int(seconds * 1e6)), 1_000_000))  # zero would mean no limit
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._seconds = seconds

    def send(self, data: bytes) -> None:
        """As Transport.send."""
        self._socket.sendall(data)

    def receive(self, most: int) -> bytes:
        """As Transport.receive."""
        self._wake_at(1)
        return self._socket.recv(most)

    def receive_into(self, view: memoryview, coming: int) -> int:
        """As Transport.receive_into; but where ``view`` is longer than ``coming``, it takes what is there."""
        # The kernel would not wake us for the last ones, so these are waited for one by one.
        many = min(len(view), coming - _WAKE_BYTES)
        self._wake_at(_WAKE_BYTES if many > 0 else 1)
        if many > 0:
            view = view[:many]
        return self._socket.recv_into(view, 0, socket.MSG_WAITALL if len(view) <= coming else 0)

    def abort(self) -> None:
        """As Transport.abort."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As Transport.close."""
        self._socket.close()

    def _wake_at(self, nbytes: int) -> None:
        """Has the kernel wake this thread when so many bytes are there (SO_RCVLOWAT), or the connection ended."""
        if nbytes != self._wakes_at:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self._wakes_at = nbytes


class TlsTransport:
    """TLS over a PlainTransport.

    Memory buffers between OpenSSL and the socket, since SSLSocket asks the kernel for each record of 16 KiB and for its
    head: measured, that costs both ends an eighth more CPU. Records are decrypted straight into the caller's memory.

    Args:
        plain: belongs to this from now on.
        context: whom to trust.
        name: the host's, which the certificate must be for.
        seconds: for which the handshake may take.

    Raises:
        OSError: the peer is not to be trusted (ssl.SSLError), went away, or is silent.
    """

    def __init__(self, plain: PlainTransport, context: ssl.SSLContext, name: str, seconds: float) -> None:
        self._plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._buffer = memoryview(bytearray(_TLS_RECEIVE_BYTES))
        self._seconds = seconds
        try:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
            self._shake_hands(time.monotonic() + seconds)
        except BaseException:
            with contextlib.suppress(OSError):  # the peer is told what is wrong with it, if it is still there
                self._flush()
            plain.close()
            raise

    def limit(self, seconds: float) -> None:
        """As Transport.limit."""
        self._seconds = seconds

    def send(self, data: bytes) -> None:
        """As Transport.send."""
        self._tls.write(data)
        self._plain.limit(self._seconds)
        self._flush()

    def receive(self, most: int) -> bytes:
        """As Transport.receive."""
        chunk = bytearray(most)
        with memoryview(chunk) as view:
            count = self._read(view, 0, least=1)
        return bytes(chunk[:count])

    def receive_into(self, view: memoryview, coming: int) -> int:
        """As Transport.receive_into."""
        return self._read(view, coming, least=len(view))

    def abort(self) -> None:
        """As Transport.abort."""
        self._plain.abort()

    def close(self) -> None:
        """As Transport.close."""
        self._plain.close()

    def _shake_hands(self, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the TLS handshake took too long")
            self._plain.limit(left)
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._feed(0):
                    raise ConnectionResetError("it closed the connection during the TLS handshake") from None
            else:
                self._flush()
                return

    def _read(self, view: memoryview, coming: int, least: int) -> int:
        """Decrypts `least` bytes or more, fewer at the end, whether the peer announced it or not, and when time is up.

        The time that `limit` gives is for the whole of it: what comes in drips is as good as nothing.
        """
        received, room = 0, len(view)
        until = time.monotonic() + self._seconds
        try:
            while received < least:
                try:
                    # The rest of one record. With a buffer it returns an int, whatever typeshed says.
                    count: Any = self._tls.read(room - received, view[received:])
                except ssl.SSLWantReadError:
                    left = until - time.monotonic()
                    if left <= 0:
                        raise BlockingIOError("no whole TLS record came in time") from None
                    self._plain.limit(left)
                    if not self._feed(coming - received):
                        break
                    continue
                if not count:
                    break
                received += count
        except OSError:
            if not received:
                raise  # else the next call meets it again
        return received

    def _feed(self, coming: int) -> bool:
        """Receives what can be decrypted next, of `coming` bytes of text; False at the connection's end."""
        self._flush()  # what OpenSSL has to say by itself: its part of a handshake, an answer to a key update
        count = self._plain.receive_into(self._buffer, max(0, coming - _TLS_RECORD_BYTES))
        self._incoming.write(self._buffer[:count])
        return bool(count)

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._plain.send(self._outgoing.read())
