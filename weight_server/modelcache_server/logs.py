"""Log lines that machines can read: JSON, or key=value for people."""

import functools
import json
import logging
import sys
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal, TextIO

LogFormat = Literal["json", "text"]
_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


@functools.lru_cache(maxsize=2)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


class _Formatter(logging.Formatter):
    def __init__(self, kind: LogFormat) -> None:
        super().__init__()
        self._json = kind == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows it in text, and is a field in JSON."""
        moment = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
        fields: dict[str, Any] = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if self._json:
            return _encode(fields)
        exception = fields.pop("exception", "")
        message = " ".join(str(fields.pop(key)) for key in ("time", "level", "message"))
        pairs = "".join(f" {key}={value}" for key, value in fields.items() if key != "logger" and value != "")
        return f"{message}{pairs}" + (f"\n{exception}" if exception else "")


class _BatchedHandler(logging.Handler):
    """Writes lines many at a time, from a thread of its own.

    A write of its own for each request's line makes a hundred connections wait for each other at the stream's lock:
    measured, that halves the requests a second. Warnings and worse are written before `emit` returns, with all before
    them, and so is everything once more waits than `_MOST_WAITING`: a reader that is too slow slows the server down,
    as it did before.
    """

    _MOST_WAITING = 10_000
    _GATHER_SECONDS = 0.01

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: SimpleQueue[str] = SimpleQueue()
        self._writing = threading.Lock()
        self._news = threading.Event()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def handle(self, record: logging.LogRecord) -> bool:
        """As logging.Handler.handle, without its lock: the queue needs none."""
        kept = bool(self.filter(record))
        if kept:
            self.emit(record)
        return kept

    def emit(self, record: logging.LogRecord) -> None:
        """Have the line written soon."""
        self._waiting.put(self.format(record) + "\n")
        if record.levelno >= logging.WARNING or self._waiting.qsize() > self._MOST_WAITING:
            self.flush()
        elif not self._news.is_set():
            self._news.set()

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            lines: list[str] = []
            try:
                while len(lines) <= self._MOST_WAITING:
                    lines.append(self._waiting.get_nowait())
            except Empty:
                pass
            # A full disk or a reader that is gone must not end the thread that had something to say.
            with suppress(OSError):
                self._stream.write("".join(lines))
                self._stream.flush()

    def _run(self) -> None:
        while True:
            self._news.wait()
            time.sleep(self._GATHER_SECONDS)
            self._news.clear()
            self.flush()


def configure(level: str, kind: LogFormat) -> None:
    """Write all logs to standard error.

    Args:
        level: such as "info".
        kind: "json" or "text".
    """
    # What no line says is not found out for each: https://docs.python.org/3/howto/logging.html#optimization.
    vars(logging).update(_srcfile=None, logThreads=False, logProcesses=False, logMultiprocessing=False)
    handler = _BatchedHandler(sys.stderr)
    handler.setFormatter(_Formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
