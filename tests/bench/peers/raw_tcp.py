"""A file in memory, sent over plain TCP: `python -m bench.peers.raw_tcp FILE` prints its port.

A request is offset and length (two little-endian uint64), the answer the bytes, sent with one call per 4 MiB.
"""

import socket
import struct
import sys
import threading
from pathlib import Path

from bench.memory import file_in_memory

REQUEST = struct.Struct("<QQ")
STEP_BYTES = 4 << 20


def request(connection: socket.socket, offset: int, into: memoryview) -> None:
    """Receive `len(into)` bytes of the file from `offset` on."""
    connection.sendall(REQUEST.pack(offset, len(into)))
    received = 0
    while received < len(into):
        count = connection.recv_into(into[received : received + STEP_BYTES], 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the peer closed the connection")
        received += count


def connect(port: int) -> socket.socket:
    """A connection to the peer on this machine."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _serve(connection: socket.socket, content: memoryview) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while wanted := connection.recv(REQUEST.size, socket.MSG_WAITALL):
            offset, length = REQUEST.unpack(wanted)
            for start in range(offset, offset + length, STEP_BYTES):
                connection.sendall(content[start : min(start + STEP_BYTES, offset + length)])


def main() -> None:
    content = file_in_memory(Path(sys.argv[1]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print("port", listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection, content), daemon=True).start()


if __name__ == "__main__":
    main()
