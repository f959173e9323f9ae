"""How far a fetch is: counters written by the downloader's threads, read by whoever shows them."""

import threading
import time
from collections import deque
from typing import Any

_RATE_SECONDS = 10.0


class Progress:
    """Thread-safe counters of one fetch.

    ``bytes`` counts file bytes that are on the volume (including those found there), ``downloadedBytes`` those that
    came from the source in this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = "planning"
        self._total = self._have = self._downloaded = self._files = self._files_done = 0
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, phase: str, *, total_bytes: int | None = None, files: int | None = None) -> None:
        """Enter a phase: "verifying", "planning", "fetching", "publishing" or "done". Totals start counters anew."""
        with self._lock:
            self._phase = phase
            if total_bytes is not None:
                self._total, self._have, self._files_done = total_bytes, 0, 0
            if files is not None:
                self._files = files

    def found(self, count: int) -> None:
        """Bytes that were on the volume already (negative: they turned out to be unusable)."""
        with self._lock:
            self._have += count

    def received(self, count: int) -> None:
        """Bytes that came from the source and were written."""
        now = time.monotonic()
        with self._lock:
            self._have += count
            self._downloaded += count
            self._samples.append((now, self._downloaded))
            while self._samples[0][0] < now - _RATE_SECONDS:
                self._samples.popleft()

    def file_done(self) -> None:
        """One more file is complete and verified."""
        with self._lock:
            self._files_done += 1

    @property
    def downloaded_bytes(self) -> int:
        """Bytes that came from the source in this process."""
        with self._lock:
            return self._downloaded

    def snapshot(self) -> dict[str, Any]:
        """The counters as JSON values; ``bytesPerSecond`` is the mean of the last 10 s."""
        now = time.monotonic()
        with self._lock:
            recent = [sample for sample in self._samples if sample[0] >= now - _RATE_SECONDS]
            rate = 0.0
            if len(recent) > 1:
                rate = (recent[-1][1] - recent[0][1]) / max(now - recent[0][0], 0.001)
            return {
                "phase": self._phase,
                "bytes": self._have,
                "totalBytes": self._total,
                "downloadedBytes": self._downloaded,
                "files": self._files_done,
                "totalFiles": self._files,
                "bytesPerSecond": round(rate),
            }
