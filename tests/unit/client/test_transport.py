"""The client's end of a connection, plain and over TLS, against real sockets."""

import contextlib
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcache.deadline import Cancellation, Deadline
from modelcache.errors import Cancelled, Unavailable
from modelcache.http_lane import HttpLane, Server
from modelcache.lane import LaneBroken
from modelcache.security import Security
from modelcache.transport import PlainTransport, TlsTransport, Transport
from support.processes import Child
from support.server_security import write_certificate

HOST = "127.0.0.1"
DATA = bytes(range(251)) * 20_000  # about 5 MB
Kind = str | ssl.TLSVersion
KINDS: list[Kind] = ["plain", ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"))


def server_context(certificate: tuple[Path, Path], version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(*certificate)
    return context


@contextlib.contextmanager
def peer(serve: Callable[[socket.socket], object], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that does this with its next connections, one after the other."""
    with socket.create_server((HOST, 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    if context is None:
                        serve(connection)
                    else:
                        with context.wrap_socket(connection, server_side=True) as secured:
                            serve(secured)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(params=KINDS, ids=str)
def open_to(request, certificate) -> Callable[..., contextlib.AbstractContextManager[Transport]]:
    """Opens a connection to a server that does what it is given."""
    kind = request.param

    @contextlib.contextmanager
    def opened(serve: Callable[[socket.socket], object]) -> Iterator[Transport]:
        with peer(serve, None if kind == "plain" else server_context(certificate, kind)) as port:
            transport: Transport = PlainTransport((HOST, port), 5)
            if kind != "plain":
                context = ssl.create_default_context(cafile=str(certificate[0]))
                transport = TlsTransport(transport, context, "localhost", 5)
            transport.limit(10)
            try:
                yield transport
            finally:
                transport.close()

    return opened


def receive_until_it_ends(receive_into: Callable[[memoryview], int], memory: memoryview, done: list[int]) -> None:
    """Calls until it raises or nothing comes; in `done`, how many bytes each call gave."""
    while count := receive_into(memory[sum(done) :]):
        done.append(count)


def receive(transport: Transport, length: int, step: int) -> bytes:
    """As the lane does: into memory, so many bytes at a time, as long as any come."""
    memory = memoryview(bytearray(length))
    received = 0
    while received < length:
        count = transport.receive_into(memory[received : min(received + step, length)], length - received)
        if not count:
            break
        received += count
    return bytes(memory[:received])


@pytest.mark.parametrize("step", [7919, 300_000, 2**20, len(DATA)])
def test_bytes_arrive_as_they_were_sent_and_the_connection_goes_on(open_to, step):
    def serve(connection: socket.socket) -> None:
        while (asked := connection.recv(100)) and asked == b"more":
            connection.sendall(b"head" + DATA)

    with open_to(serve) as transport:
        for _ in range(2):
            transport.send(b"more")
            assert transport.receive(4) == b"head"
            assert hashlib.sha256(receive(transport, len(DATA), step)).digest() == hashlib.sha256(DATA).digest()


def test_a_sender_of_small_pieces_is_waited_for_and_what_follows_is_not(open_to):
    answered = threading.Event()

    def serve(connection: socket.socket) -> None:
        for start in range(0, len(DATA), 40_961):
            connection.sendall(DATA[start : start + 40_961])
        answered.wait(10)  # nothing more comes: whoever waited for it would be late

    with open_to(serve) as transport:
        assert receive(transport, len(DATA), 2**20) == DATA
        answered.set()


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_ends_early_is_never_taken_for_whole(open_to, announced):
    def serve(connection: socket.socket) -> None:
        connection.sendall(DATA[:1_000_000])
        if announced and isinstance(connection, ssl.SSLSocket):
            connection.settimeout(0.1)  # it waits for an answer
            connection.unwrap()

    with open_to(serve) as transport:
        assert receive(transport, len(DATA), 300_000) == DATA[:1_000_000]
        assert transport.receive_into(memoryview(bytearray(10)), 10) == 0


def test_a_record_that_the_peer_did_not_make_is_an_error(certificate):
    def serve(connection: socket.socket) -> None:
        connection.sendall(DATA[:500_000])
        os.write(connection.fileno(), b"\x17\x03\x03\x00\x30" + bytes(48))
        connection.sendall(DATA[500_000:])

    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    with peer(serve, server_context(certificate, ssl.TLSVersion.TLSv1_3)) as port:
        transport = TlsTransport(PlainTransport((HOST, port), 5), trusted, "localhost", 5)
        memory, done = memoryview(bytearray(len(DATA))), []
        with pytest.raises(ssl.SSLError):
            receive_until_it_ends(lambda view: transport.receive_into(view[:100_000], len(view)), memory, done)
        transport.close()
    assert memory[: sum(done)] == DATA[:500_000]


def test_silence_ends_the_wait_and_gives_what_came(open_to):
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(DATA[:100_000])
        over.wait(20)

    with open_to(serve) as transport:
        transport.limit(0.2)
        memory = memoryview(bytearray(len(DATA)))
        done: list[int] = []
        started = time.monotonic()
        with pytest.raises(BlockingIOError):
            receive_until_it_ends(lambda view: transport.receive_into(view, len(view)), memory, done)
        assert memory[: sum(done)] == DATA[:100_000]
        assert time.monotonic() - started < 5
        over.set()


def test_a_limit_that_changes_is_kept(open_to):
    over = threading.Event()
    with open_to(lambda _: over.wait(20)) as transport:
        transport.limit(0.9999999)  # there is no millionth microsecond
        for seconds in (0.3, 0.1):
            transport.limit(20)
            transport.limit(seconds)
            started = time.monotonic()
            with pytest.raises(BlockingIOError):
                transport.receive(1)
            assert 0.9 * seconds <= time.monotonic() - started < 5
        over.set()


def test_an_abort_ends_a_wait_in_another_thread(open_to):
    over = threading.Event()
    with open_to(lambda _: over.wait(20)) as transport:
        aborting = threading.Timer(0.05, transport.abort)
        aborting.start()
        assert transport.receive_into(memoryview(bytearray(2**20)), 2**20) == 0
        aborting.join()
        over.set()


@pytest.mark.parametrize(("trusted", "name"), [(False, "localhost"), (True, "elsewhere")])
def test_who_cannot_be_verified_is_told_so_and_never_used(certificate, trusted, name):
    told: list[ssl.SSLError] = []
    context = server_context(certificate, ssl.TLSVersion.TLSv1_3)

    def serve(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1)
        except ssl.SSLError as error:
            told.append(error)

    trust = ssl.create_default_context(cafile=str(certificate[0]) if trusted else None)
    with peer(serve) as port, pytest.raises(ssl.SSLCertVerificationError):
        TlsTransport(PlainTransport((HOST, port), 5), trust, name, 5)
    assert "ALERT" in str(told[0].reason)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_who_does_not_speak_tls_is_an_error(said):
    with peer(lambda connection: connection.sendall(said)) as port, pytest.raises(OSError):
        TlsTransport(PlainTransport((HOST, port), 5), ssl.create_default_context(), "localhost", 5)


def test_a_handshake_that_drips_is_ended(certificate):
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        # A record that says it is long, byte by byte.
        for byte in b"\x16\x03\x03\x40\x00" + bytes(2**14):
            if stop.wait(0.02):
                return
            connection.sendall(bytes([byte]))

    started = time.monotonic()
    with peer(serve) as port:
        with pytest.raises(OSError):
            TlsTransport(PlainTransport((HOST, port), 5), ssl.create_default_context(), "localhost", 0.5)
        stop.set()
    assert time.monotonic() - started < 5


def test_new_keys_are_agreed_on_in_the_middle(certificate):
    chain, key = certificate
    command = ["openssl", "s_server", "-accept", f"{HOST}:0", "-cert", str(chain), "-key", str(key), "-tls1_3"]
    with Child(command) as server:
        port = int(server.wait_for(r"ACCEPT \S*:(\d+)")[1])
        context = ssl.create_default_context(cafile=str(chain))
        transport = TlsTransport(PlainTransport((HOST, port), 5), context, "localhost", 5)
        transport.limit(10)
        try:
            for number in range(3):
                server.send("K")  # new keys from here on, and the peer is to take new ones too
                transport.send(f"sync {number}\n".encode())
                server.wait_for(f"^sync {number}$")  # read after the command, which must be read alone
                server.send(f"text {number}")
                assert receive(transport, 7, 7) == f"text {number}\n".encode()
                transport.send(f"answer {number}\n".encode())
                server.wait_for(f"^answer {number}$")
        finally:
            transport.close()


def test_the_lane_never_gives_less_than_was_asked_for(certificate):
    """What a transport ends early is LaneBroken to a reader, and the connection is not used again."""
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heads.append(connection.recv(1000))
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\n\r\n" + bytes(900_000))

    with peer(serve, server_context(certificate, ssl.TLSVersion.TLSv1_3)) as port:
        lane = HttpLane(Security("", str(certificate[0])))
        server = Server(HOST, port, "localhost", tls=True)
        for _ in range(2):
            stream = lane.open(server, "a" * 64, "w", 0, 1_000_000, Deadline(10))
            done: list[int] = []
            with pytest.raises(LaneBroken, match="closed the connection"):
                receive_until_it_ends(stream.read_into, memoryview(bytearray(1_000_000)), done)
            assert sum(done) == 900_000
            stream.discard()
        lane.close()
    assert len(heads) == 2


def test_a_read_that_is_called_off_ends_over_tls_too(certificate):
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\n\r\n")
        over.wait(20)

    with peer(serve, server_context(certificate, ssl.TLSVersion.TLSv1_3)) as port:
        lane = HttpLane(Security("", str(certificate[0])))
        cancellation = Cancellation()
        stream = lane.open(
            Server(HOST, port, "localhost", tls=True), "a" * 64, "w", 0, 1_000_000, Deadline(60, cancellation)
        )
        calling_off = threading.Timer(0.05, cancellation.cancel)
        calling_off.start()
        with pytest.raises(Cancelled):
            stream.read_into(memoryview(bytearray(1_000_000)))
        calling_off.join()
        stream.discard()
        lane.close()
        over.set()


HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("at_once", [b"HTTP/1.1 206 Partial Content\r\nX: ", HEAD], ids=["head", "body"])
def test_a_server_that_drips_is_left_at_the_deadline(certificate, tls, at_once):
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(at_once)
        while not stop.wait(0.02):
            connection.sendall(b"x")

    started = time.monotonic()
    with peer(serve, server_context(certificate, ssl.TLSVersion.TLSv1_3) if tls else None) as port:
        lane = HttpLane(Security("", str(certificate[0])))
        server = Server(HOST, port, "localhost", tls)

        def read() -> None:
            stream = lane.open(server, "a" * 64, "w", 0, 1_000_000, Deadline(0.5))
            try:
                receive_until_it_ends(stream.read_into, memoryview(bytearray(1_000_000)), [])
            finally:
                stream.discard()

        stopping = threading.Timer(20, stop.set)  # where the deadline is not kept, so that the test ends
        stopping.start()
        try:
            with pytest.raises(Unavailable, match=r"within 0\.5 s"):
                read()
        finally:
            stop.set()
            stopping.cancel()
            lane.close()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("length", [b"many", b"9" * 5000, b"-1", b"1e6", b""])
def test_a_length_that_is_none_is_a_broken_answer(length):
    def serve(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: " + length + b"\r\n\r\n")

    with peer(serve) as port, pytest.raises(LaneBroken, match="where 1000 were asked for"):
        HttpLane(Security()).open(Server(HOST, port, "localhost", tls=False), "a" * 64, "w", 0, 1000, Deadline(10))


def test_a_kept_connection_that_falls_silent_is_not_waited_for_on_another(monkeypatch):
    monkeypatch.setattr("modelcache.http_lane.STALL_SECONDS", 0.3)
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while head := connection.recv(1000):
            heads.append(head)
            if len(heads) == 1:
                connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nabcd")

    with peer(serve) as port:
        lane = HttpLane(Security())
        server = Server(HOST, port, "localhost", tls=False)
        stream = lane.open(server, "a" * 64, "w", 0, 4, Deadline(10))
        assert stream.read_into(memoryview(bytearray(4))) == 4
        stream.close()
        with pytest.raises(LaneBroken, match=r"sent nothing for 0\.3 s"):
            lane.open(server, "a" * 64, "w", 0, 4, Deadline(10))
        lane.close()
    assert len(heads) == 2
