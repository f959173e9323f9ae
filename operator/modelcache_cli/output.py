"""What commands print: people's sentences on standard error, results on standard output, progress on either.

Progress is a bar when standard error is a terminal and tqdm is installed (it comes with every extra that downloads),
else one line of JSON a second on standard output.
"""

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol, Self

from modelcache_cli.failures import OutputError

_BAR_SECONDS = 0.1
_JSON_SECONDS = 1.0

Counters = Callable[[], dict[str, Any]]
"""Gives "phase", "bytes", "totalBytes" (bytes) and what else belongs into a line of JSON."""


class _Shown(Protocol):
    def update(self, counters: dict[str, Any]) -> None: ...

    def close(self, counters: dict[str, Any]) -> None: ...


def say(text: str) -> None:
    """A line for people, on standard error; control characters in it are shown, not obeyed."""
    print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def writing() -> Iterator[None]:
    """For what writes to standard output.

    Raises:
        OutputError: It could not.
        BrokenPipeError: Whoever read it has gone, as `head` does; no error of ours.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def emit(text: str = "") -> None:
    """A line of what was asked for, on standard output. Raises as `writing`."""
    with writing():
        print(text)


def printable(text: str) -> str:
    """A name that somebody else chose, without characters that could steer a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def print_json(value: Any) -> None:
    """A value as indented JSON on standard output."""
    emit(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns with two spaces between, the header in capitals.

    Args:
        header: The columns' names.
        rows: Cells; control characters in them are shown, not obeyed.
        right: Columns (from 0) that are aligned to the right.
    """
    table = [[name.upper() for name in header], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        emit("  ".join(cells).rstrip())


class ProgressDisplay:
    """Shows counters that other threads advance, until the block is left.

    Args:
        counters: Called from the display's thread.
        label: What is being done, before the bar.
    """

    def __init__(self, counters: Counters, label: str) -> None:
        self._counters = counters
        bar = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
        self._shown: _Shown = _Bar(label) if bar else _JsonLines()
        self._interval = _BAR_SECONDS if bar else _JSON_SECONDS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def _run(self) -> None:
        # Who reads the progress may be gone: `close` tells it to the thread that does the work.
        with suppress(OutputError, BrokenPipeError):
            while not self._stop.wait(self._interval):
                self._shown.update(self._counters())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._shown.close(self._counters())


class _Bar:
    """tqdm's bar on standard error."""

    def __init__(self, label: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=True, dynamic_ncols=True)

    def update(self, counters: dict[str, Any]) -> None:
        self._bar.total = counters["totalBytes"] or None
        self._bar.n = counters["bytes"]
        self._bar.refresh()

    def close(self, counters: dict[str, Any]) -> None:
        self.update(counters)
        self._bar.close()


class _JsonLines:
    """One object a line on standard output."""

    def update(self, counters: dict[str, Any]) -> None:
        with writing():
            print(json.dumps(counters), flush=True)

    close = update


class ByteCounter:
    """Counts bytes of one phase, for work that reports only how many came since the last call."""

    def __init__(self, phase: str, total_bytes: int) -> None:
        self._phase = phase
        self._total = total_bytes
        self._done = 0
        self._started = time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more are done; called from one thread."""
        self._done += count

    def counters(self) -> dict[str, Any]:
        """The counters as JSON values."""
        rate = self._done / max(time.monotonic() - self._started, 0.001)
        return {
            "phase": self._phase,
            "bytes": self._done,
            "totalBytes": self._total,
            "bytesPerSecond": round(rate),
        }
