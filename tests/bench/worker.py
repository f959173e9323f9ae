"""Measurements in a process of their own, taken one at a time when the bench asks.

Two sides in one process would share malloc's settings, torch's threads and each other's memory. A worker that is not
asked sleeps in a read of its stdin and costs nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from support.processes import Child

_TIMEOUT_SECONDS = 120


class Worker:
    """The bench's end: starts `python -m bench.workers.NAME ARGUMENTS…`; ends it on leaving the context."""

    def __init__(self, name: str, *arguments: str | Path, env: Mapping[str, str] | None = None):
        self._child = Child.module(f"bench.workers.{name}", *arguments, env=env)

    def __enter__(self) -> Self:
        self._child.__enter__()
        self._child.wait_for("^ready$", _TIMEOUT_SECONDS)
        return self

    def __exit__(self, *error) -> None:
        self._child.__exit__(*error)

    def measure(self) -> float:
        """Have it measure once; the value."""
        self.start()
        return self.finish()

    def start(self) -> None:
        """Have it begin to measure."""
        self._child.send("measure")

    def finish(self) -> float:
        """Wait for the value."""
        return float(json.loads(self._child.wait_for(r"^value (.*)$", _TIMEOUT_SECONDS)[1]))


def together(*workers: Worker) -> float:
    """Seconds until each has measured once, all at the same time."""
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.finish()
    return time.perf_counter() - started


def answer(measure: Callable[[], float]) -> None:
    """The worker's end: all set up, measure each time the bench asks, until it closes the pipe."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print("value", json.dumps(measure()), flush=True)
