"""How long a read may take, and how it is called off from another thread."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from modelcache.errors import Cancelled, Unavailable

__all__ = ["PORTION_BYTES", "Cancellation", "Deadline"]

# So much has the time of a deadline each: what is larger, or the wire slower, is no failure of the server.
PORTION_BYTES = 64 * 2**20


class _Closable(Protocol):
    def abort(self) -> None: ...


class Cancellation:
    """Calls off every read that was started under it, from any thread, for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: set[_Closable] = set()
        self._event = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Ends waits and breaks the streams that are open; they raise ``Cancelled``."""
        self._event.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.abort()

    def attach(self, stream: _Closable) -> None:
        """Has ``stream`` broken off when ``cancel`` is called."""
        with self._lock:
            self._streams.add(stream)
        if self._event.is_set():
            stream.abort()

    def detach(self, stream: _Closable) -> None:
        """Undoes ``attach``."""
        with self._lock:
            self._streams.discard(stream)

    def wait(self, seconds: float) -> None:
        """Sleeps, at most until it is cancelled."""
        self._event.wait(seconds)


class Deadline:
    """The moment until which one read, or the next 64 MiB of a larger one, has to be done.

    Args:
        seconds: from now, and again from when a portion was delivered.
        cancellation: ends it earlier.
    """

    def __init__(self, seconds: float, cancellation: Cancellation | None = None) -> None:
        self.seconds = seconds
        self.cancellation = cancellation or Cancellation()
        self._at = time.monotonic() + seconds
        self._last_error = ""
        self._delivered = 0

    def delivered(self, nbytes: int) -> None:
        """Counts bytes that arrived; the next portion has the whole time again."""
        self._delivered += nbytes
        if self._delivered >= PORTION_BYTES:
            self._delivered = 0
            self._at = time.monotonic() + self.seconds

    def note(self, error: object) -> None:
        """Keeps what went wrong last, for the message of ``Unavailable``."""
        self._last_error = str(error)

    def remaining(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            Unavailable: none is left.
            Cancelled: the read was called off.
        """
        if self.cancellation.cancelled:
            raise Cancelled("The model was cleaned up while it was reading; create it anew to go on.")
        left = self._at - time.monotonic()
        if left <= 0:
            why = f" Last: {self._last_error.rstrip('. ')}." if self._last_error else ""
            raise Unavailable(
                f"No weight server delivered within {self.seconds:g} s.{why} Check that it runs and can be reached; "
                "the call can be repeated."
            )
        return left

    def pause(self, seconds: float) -> None:
        """Waits before another attempt, not beyond the deadline."""
        self.cancellation.wait(min(seconds, self.remaining()))
