"""Children of tests end with them, and say what went wrong."""

import signal
import sys
import time
from pathlib import Path

import pytest

from support.processes import Child, ChildFailedError


def python(code: str) -> Child:
    return Child([sys.executable, "-c", code])


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def test_lines_are_found_in_order():
    with python("print('port 1234'); print('ready'); input()") as child:
        assert child.wait_for(r"port (\d+)")[1] == "1234"
        child.wait_for("ready")


def test_a_child_that_dies_early_shows_its_output():
    with python("raise ValueError('no model here')") as child, pytest.raises(ChildFailedError, match="no model here"):
        child.wait_for("ready")


def test_a_silent_child_is_given_up_after_the_timeout():
    with python("input()") as child, pytest.raises(ChildFailedError, match=r"ran for 0\.1 s"):
        child.wait_for("ready", timeout=0.1)


def test_grandchildren_go_too():
    code = "import subprocess; p = subprocess.Popen(['sleep', '600'], stdout=None); print('pid', p.pid); input()"
    with python(code) as child:
        grandchild = int(child.wait_for(r"pid (\d+)")[1])
    deadline = time.monotonic() + 30
    while state(grandchild) not in {"gone", "Z", "X"}:  # signalled, and dying when the machine has time for it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stop_gives_the_exit_code():
    handler = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready'); signal.pause()"
    )
    with python(handler) as child:
        child.wait_for("ready")
        assert child.stop() == 7
    with python("input()") as child:
        assert child.stop() == -signal.SIGTERM
