import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelcache_server import congestion
from modelcache_server.errors import ServerError
from modelcache_server.http_message import Request
from modelcache_server.http_server import HttpServer
from modelcache_server.settings import HttpLimits

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text(encoding="ascii").split()


def listening(to_close: ExitStack, congestion_control: str) -> socket.socket:
    listener = to_close.enter_context(socket.create_server(("127.0.0.1", 0)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
    return listener


def of_accepted(listener: socket.socket, to_close: ExitStack) -> str:
    to_close.enter_context(socket.create_connection(listener.getsockname()))
    accepted = to_close.enter_context(listener.accept()[0])
    return accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


@pytest.mark.skipif("bbr" not in AVAILABLE, reason="the kernel has no BBR")
def test_connections_are_not_paced_where_the_system_would():
    with ExitStack() as to_close:
        listener = listening(to_close, "bbr")
        chosen = congestion.choose(listener)
        assert chosen in {"cubic", "reno"}
        assert of_accepted(listener, to_close) == chosen


def test_what_does_not_pace_stays_the_systems():
    with ExitStack() as to_close:
        listener = listening(to_close, "reno")
        assert congestion.choose(listener) == "reno"


def test_a_name_is_taken_as_it_is():
    with ExitStack() as to_close:
        listener = listening(to_close, AVAILABLE[-1])
        assert congestion.choose(listener, "reno") == "reno"
        assert of_accepted(listener, to_close) == "reno"


def test_what_the_machine_does_not_have_is_refused_by_name_and_leaves_no_listener():
    def app(_request: Request, _client: str) -> None:
        raise AssertionError("nobody asks")

    server = HttpServer(
        app, lane="http", limits=HttpLimits(), observe=lambda _: None, congestion_control="carrier-pigeon"
    )
    with pytest.raises(ServerError, match=r"'carrier-pigeon' cannot be used: .*tcp_allowed_congestion_control"):
        server.start("127.0.0.1", 0)
    server.stop(grace=0)
