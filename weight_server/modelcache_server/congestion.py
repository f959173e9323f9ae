"""TCP's congestion control of what is sent: the system's, unless that paces.

BBR, which some machines have as their default for the sake of long ways over the internet, paces what it sends. Between
pods that gains nothing and costs: measured with both ends on one machine, 1 GiB over one connection took 0.33 s of
which the sender computed 0.31, and 0.26 and 0.25 with Cubic.
"""

import socket

from modelcache_server.errors import ServerError

_PACING = "bbr"
_NOT_PACING = ("cubic", "reno")  # Linux lets every program use Reno
_NAME_BYTES = 16  # TCP_CA_NAME_MAX


def choose(listener: socket.socket, name: str = "") -> str:
    """Set it for all connections that will be accepted; returns its name.

    Args:
        listener: a listening TCP socket.
        name: as in net.ipv4.tcp_available_congestion_control; empty: the system's, but Cubic or Reno in place of BBR.

    Raises:
        ServerError: this machine does not have it, or does not allow it.
    """
    if name:
        try:
            _set(listener, name)
        except OSError as error:
            raise ServerError(
                f"Congestion control {name!r} cannot be used: {error.strerror}. "
                "Choose one that `sysctl net.ipv4.tcp_allowed_congestion_control` lists, or leave it to the system."
            ) from error
    elif _get(listener).startswith(_PACING):
        for other in _NOT_PACING:
            try:
                _set(listener, other)
            except OSError:  # Not there, or not allowed: the next, or it stays as it is.
                continue
            break
    return _get(listener)


def _get(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES).rstrip(b"\0").decode("ascii")


def _set(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
