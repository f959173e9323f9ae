"""Connections share few threads, and none of them can hold the others up."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from modelcache_server.http_connection import Reply
from modelcache_server.http_message import Request
from modelcache_server.http_server import HttpServer
from modelcache_server.settings import HttpLimits

HEAD = b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n"


@contextmanager
def serving(app: Callable[[Request, str], Reply], **limits: float) -> Iterator[tuple[HttpServer, int]]:
    server = HttpServer(app, lane="lobby", limits=HttpLimits(**limits), observe=lambda _: None)
    try:
        yield server, server.start("127.0.0.1", 0)
    finally:
        server.stop(5.0)
        assert not our_threads()


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lobby")]


def connected(port: int, to_close: ExitStack) -> socket.socket:
    return to_close.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))


def answer(client: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        more = client.recv(4096)
        assert more, "closed instead of answered"
        data += more
    return data


def ok(_request: Request, _client: str) -> Reply:
    return Reply(200)


def ok_with_its_body(request: Request, _client: str) -> Reply:
    request.content(100)
    return Reply(200)


def test_a_hundred_kept_connections_share_a_few_threads():
    with serving(ok) as (server, port), ExitStack() as to_close:
        clients = [connected(port, to_close) for _ in range(100)]
        for _ in range(3):
            for client in clients:
                client.sendall(HEAD)
            assert all(answer(client).startswith(b"HTTP/1.1 200") for client in clients)
        assert server.connections == 100
        assert len(our_threads()) < 20


def test_answers_that_take_long_do_not_hold_up_the_others():
    release = threading.Event()

    def app(request: Request, _client: str) -> Reply:
        if request.path == "/slow":
            release.wait(20)
        return Reply(200)

    with serving(app) as (_, port), ExitStack() as to_close:
        slow = [connected(port, to_close) for _ in range(7)]
        for client in slow:
            client.sendall(HEAD.replace(b" / ", b" /slow "))
        quick = connected(port, to_close)
        for _ in range(3):
            quick.sendall(HEAD)
            assert answer(quick)
        assert not release.is_set()
        release.set()
        assert all(answer(client) for client in slow)


def test_halves_of_requests_hold_no_thread_and_are_told_when_time_is_over():
    post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"
    with serving(ok_with_its_body, header_seconds=1.0) as (_, port), ExitStack() as to_close:
        halves = [connected(port, to_close) for _ in range(60)]
        for number, client in enumerate(halves):
            client.sendall(HEAD[:-3] if number % 2 else post + b"1234")
        whole = connected(port, to_close)
        whole.sendall(HEAD)
        assert answer(whole)
        assert len(our_threads()) < 20
        assert all(client.recv(4096).startswith(b"HTTP/1.1 408") for client in halves)


def test_a_request_in_pieces_and_several_at_once_are_answered():
    with serving(ok) as (_, port), ExitStack() as to_close:
        client = connected(port, to_close)
        for byte in HEAD:
            client.sendall(bytes([byte]))
        assert answer(client)
        client.sendall(HEAD * 3 + HEAD[:9])
        answers = answer(client)
        while answers.count(b"HTTP/1.1 200") < 3:
            answers += answer(client)
        client.sendall(HEAD[9:])
        assert answer(client)


def test_silence_ends_a_connection():
    with serving(ok, idle_seconds=0.3) as (server, port), ExitStack() as to_close:
        client = connected(port, to_close)
        client.sendall(HEAD)
        assert answer(client)
        began = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - began < 10
        assert server.connections == 0


def test_a_stop_closes_who_waits():
    with ExitStack() as to_close:
        with serving(ok) as (server, port):
            client = connected(port, to_close)
            client.sendall(HEAD)
            assert answer(client)
        assert server.connections == 0
        assert client.recv(1) == b""


def test_those_who_wait_are_answered_in_the_order_of_arrival():
    order = []
    begun, release = threading.Event(), threading.Event()

    def app(request: Request, _client: str) -> Reply:
        order.append(int(request.path[1:]))
        if request.path == "/0":
            begun.set()
            release.wait(20)
        return Reply(200)

    with serving(app) as (_, port), ExitStack() as to_close:
        clients = [connected(port, to_close) for _ in range(50)]
        for number, client in enumerate(clients):
            client.sendall(HEAD.replace(b" / ", b" /%d " % number))
            if not number:
                assert begun.wait(20)
        release.set()
        assert all(answer(client) for client in clients)
    assert order == list(range(50))


def test_a_thread_that_answered_at_length_is_used_again():
    names = set()

    def app(request: Request, _client: str) -> Reply:
        names.add(threading.current_thread().ident)
        if request.path == "/slow":
            time.sleep(0.15)  # longer than a thread may be stuck
        return Reply(200)

    with serving(app) as (_, port), ExitStack() as to_close:
        slow, quick = connected(port, to_close), connected(port, to_close)
        for _ in range(5):
            slow.sendall(HEAD.replace(b" / ", b" /slow "))
            quick.sendall(HEAD)
            assert answer(quick)
            assert answer(slow)
    assert len(names) <= 3


def test_where_no_other_thread_can_be_started_the_one_there_goes_on(monkeypatch):
    def app(request: Request, _client: str) -> Reply:
        if request.path == "/slow":
            time.sleep(0.15)  # longer than a thread may be stuck
        return Reply(200)

    def refuses(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving(app) as (_, port), ExitStack() as to_close:
        slow, quick = connected(port, to_close), connected(port, to_close)
        slow.sendall(HEAD)
        assert answer(slow)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuses)
            slow.sendall(HEAD.replace(b" / ", b" /slow "))
            quick.sendall(HEAD)
            assert answer(quick)
            assert answer(slow)
