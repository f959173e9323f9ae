"""The server's end of a connection."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator

from modelcache_server.streams import PlainStream, Stream, TlsStream
from modelcache_volume import BLOCK_BYTES
from support.server_security import write_certificate

SEND_SECONDS = 0.3


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection; the far one has little room for what it has not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as far:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        far.connect(listener.getsockname())
        near, _ = listener.accept()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        with near:
            yield near, far


def seconds_of_one_send(stream: Stream, reader: socket.socket | ssl.SSLSocket) -> float:
    """Of a block, to a reader that takes 128 KiB each tenth of a second."""
    over = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.1):
                for _ in range(8):
                    reader.recv(16 * 1024)

    reading = threading.Thread(target=read)
    reading.start()
    started = time.monotonic()
    taken = stream.send([memoryview(bytes(BLOCK_BYTES))])
    seconds = time.monotonic() - started
    over.set()
    stream.shut()
    reading.join()
    assert 0 < taken < BLOCK_BYTES
    return seconds


def test_one_send_holds_a_block_for_a_bounded_time_over_tls_as_without(tmp_path):
    certificate, key = write_certificate(tmp_path)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key)
    client_context = ssl.create_default_context(cafile=str(certificate))
    with connected() as (near, far):
        assert seconds_of_one_send(PlainStream(near, send_seconds=SEND_SECONDS), far) < 5 * SEND_SECONDS
    with connected() as (near, far):
        secured: list[ssl.SSLSocket] = []
        shaking = threading.Thread(
            target=lambda: secured.append(client_context.wrap_socket(far, server_hostname="localhost"))
        )
        shaking.start()
        stream = TlsStream(PlainStream(near, send_seconds=SEND_SECONDS), server_context, handshake_seconds=10)
        shaking.join()
        with secured[0] as reader:
            assert seconds_of_one_send(stream, reader) < 5 * SEND_SECONDS
