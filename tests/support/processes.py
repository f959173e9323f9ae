"""Programs that tests start: their output, their readiness, and their certain end."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent


class ChildFailedError(AssertionError):
    """A program ended, or stayed silent, before it printed what was waited for."""


class Child:
    """A running program whose output is read line by line, stdout and stderr together.

    Use it as a context manager: on leaving, it and all processes of its group are gone. They also go when the test
    run itself is killed: the kernel sends SIGKILL when the thread that started the program ends.
    """

    def __init__(self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY):
        self.name = " ".join(map(str, command))
        self._lines: list[str] = []
        self._read = 0
        self._closed = False
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=cwd,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read_output, name=f"output of {self.name}", daemon=True)
        self._reader.start()

    @classmethod
    def module(cls, name: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Self:
        """Start `python -m NAME`; modules of `support` and `bench` are found too."""
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        return cls([sys.executable, "-m", name, *arguments], env={"PYTHONPATH": path, **(env or {})})

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._closed = True
            self._news.notify_all()

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self.process.pid

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        with self._news:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for a line, among those no earlier call has passed, in which the regular expression is found.

        Raises:
            ChildFailedError: the program ended without it, or did not print it within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                while self._read < len(self._lines):
                    line = self._lines[self._read]
                    self._read += 1
                    if found := re.search(pattern, line):
                        return found
                if self._closed:
                    what = "ended"
                elif self._news.wait(deadline - time.monotonic()):
                    continue
                else:
                    what = f"ran for {timeout:g} s"
                tail = "\n".join(self._lines[-40:])
                raise ChildFailedError(f"{self.name} {what} without printing {pattern!r}. It printed:\n{tail}")

    def send(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self, timeout: float = 60) -> int:
        """Wait for it to end by itself; its exit code (negative: the signal that killed it)."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop(self, timeout: float = 30) -> int:
        """Ask it to end (SIGTERM), as Kubernetes does, and wait; its exit code."""
        self.process.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        """End it and all processes of its group at once (SIGKILL), and close its pipes."""
        with contextlib.suppress(ProcessLookupError):  # the group is gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was still buffered for its stdin has no reader any more
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed below
                self.process.wait(10)
        self.kill()
