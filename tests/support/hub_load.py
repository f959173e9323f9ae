"""What many pods ask of a hub at once: kept connections that each send a list of requests one after the other."""

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Load:
    """What came of it.

    Attributes:
        seconds: from each request to the end of its answer, in the order of their ends.
        statuses: how many answers had each status.
        received: bytes of bodies.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    received: int = 0


@dataclass
class _Client:
    connection: socket.socket
    left: list[tuple[str, str]]
    sent_at: float = 0.0
    method: str = ""
    head: bytes = b""
    body_left: int = 0


def ask_at_once(port: int, requests: Sequence[tuple[str, str]], *, clients: int) -> Load:
    """Have `clients` connections send all of the requests (method and path) each, and read the answers.

    Raises:
        ConnectionError: The server closed a connection.
        TimeoutError: Nothing came for a minute.
    """
    load = Load()
    with selectors.DefaultSelector() as selector:
        waiting = set()
        try:
            for _ in range(clients):
                connection = socket.create_connection(("127.0.0.1", port))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client = _Client(connection, list(reversed(requests)))
                selector.register(connection, selectors.EVENT_READ, client)
                waiting.add(connection)
            for key in list(selector.get_map().values()):
                _send(key.data)
            while waiting:
                ready = selector.select(60)
                if not ready:
                    raise TimeoutError("no answer for a minute")
                for key, _ in ready:
                    if _receive(key.data, load) and not _send(key.data):
                        selector.unregister(key.fileobj)
                        waiting.remove(key.fileobj)
                        key.data.connection.close()
        finally:
            for connection in waiting:
                connection.close()
    return load


def _send(client: _Client) -> bool:
    """Send the next request; False when there is none."""
    if not client.left:
        return False
    client.method, path = client.left.pop()
    client.head, client.body_left = b"", 0
    client.sent_at = time.perf_counter()
    client.connection.sendall(f"{client.method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return True


def _receive(client: _Client, load: Load) -> bool:
    """Take what has come; True when it ends an answer."""
    data = client.connection.recv(1 << 18)
    if not data:
        raise ConnectionError("the server closed the connection")
    if client.body_left:
        client.body_left -= len(data)
        load.received += len(data)
    else:
        client.head += data
        head, end, body = client.head.partition(b"\r\n\r\n")
        if not end:
            return False
        status = int(head[9:12])
        load.statuses[status] = load.statuses.get(status, 0) + 1
        if client.method != "HEAD":
            lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            client.body_left = int(lengths[0].partition(b":")[2]) - len(body)
            load.received += len(body)
    if client.body_left:
        return False
    load.seconds.append(time.perf_counter() - client.sent_at)
    return True
