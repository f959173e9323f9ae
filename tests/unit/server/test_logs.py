"""Log lines: all of them, in order, and the bad news at once."""

import io
import json
import logging
import subprocess
import sys
import threading

import pytest

from modelcache_server import logs


@pytest.fixture
def stream(monkeypatch):
    """What `configure` logs to; the logging of the test run is put back afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    # basicConfig(force=True) closes what it replaces, and pytest still needs its own.
    root.handlers.clear()
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logs.configure("info", "json")
    yield written
    root.handlers[:] = before
    root.setLevel(level)


def test_lines_of_many_threads_arrive_whole_and_each_threads_in_order(stream):
    log = logging.getLogger("test")
    threads = [
        threading.Thread(target=lambda name=name: [log.info("%s %d", name, n) for n in range(500)]) for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handler in logging.getLogger().handlers:
        handler.flush()
    messages = [json.loads(line)["message"].split() for line in stream.getvalue().splitlines()]
    for name in "abcd":
        assert [int(number) for thread, number in messages if thread == name] == list(range(500))


def test_a_warning_is_there_at_once_with_what_came_before_it(stream):
    log = logging.getLogger("test")
    log.info("before")
    log.warning("bad")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["before", "bad"]


def test_nothing_is_lost_at_the_end_of_the_program():
    script = (
        "import logging; from modelcache_server import logs; logs.configure('info', 'json')\n"
        "for n in range(25000): logging.getLogger('x').info('%d', n)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert [int(json.loads(line)["message"]) for line in done.stderr.splitlines()] == list(range(25000))


def test_a_reader_of_the_log_that_is_gone_takes_nobody_with_it():
    script = (
        "import logging, threading; from modelcache_server import logs; logs.configure('info', 'json')\n"
        "log = logging.getLogger('x'); input()\n"
        "log.warning('told to nobody')\n"  # before: BrokenPipeError, in whatever thread had to say something
        "for n in range(25000): log.info('%d', n)\n"
        "print('log' in {thread.name for thread in threading.enumerate()})\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stderr.close()
        out, _ = child.communicate("go\n", timeout=60)
    assert out == "True\n"
