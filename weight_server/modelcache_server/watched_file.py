"""Files that are replaced while the server runs: certificates and keys, as Kubernetes mounts them."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Parsed = TypeVar("Parsed")

_LOOK_SECONDS = 1.0


class WatchedFiles(Generic[Parsed]):
    """What some files mean, read anew when they change; a change that makes no sense leaves what was. Thread safe."""

    def __init__(
        self, paths: tuple[Path, ...], parse: Callable[[], Parsed], complain: Callable[[Exception], None]
    ) -> None:
        """Read now.

        Args:
            paths: the files; also a change of what a link leads to counts.
            parse: reads and checks them; may raise ValueError or OSError (ssl.SSLError is one).
            complain: told of a change that could not be used.

        Raises:
            ValueError, OSError: what `parse` raised.
        """
        self._paths = paths
        self._parse = parse
        self._complain = complain
        self._lock = threading.Lock()
        self._state = self._look()
        self._value = parse()
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def get(self) -> Parsed:
        """What the files mean now; looks at them at most once a second."""
        if time.monotonic() < self._next_look or not self._lock.acquire(blocking=False):
            return self._value
        try:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            state = self._look()
            if state != self._state:
                try:
                    value = self._parse()
                except (ValueError, OSError) as error:
                    self._complain(error)
                else:
                    # Replaced while it was read: read it again at the next look.
                    if self._look() == state:
                        self._value, self._state = value, state
        finally:
            self._lock.release()
        return self._value

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        seen: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                seen.append(None)
            else:
                seen.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(seen)
