"""What stands between a client and a server: a forward proxy, TLS with a private authority."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class _Listener:
    """Gives each connection to `serve`, in a thread of its own, until it is stopped.

    Attributes:
        port: On the loopback address.
        url: Its address.
    """

    def __init__(self, scheme: str = "http") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._guarded, args=(client,), daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.serve(client)


class ForwardProxy(_Listener):
    """An HTTP proxy (absolute URLs and CONNECT) that sends each host's requests to an address; 502 for other hosts.

    Attributes:
        asked: The first line of each request.
        logins: Values of Proxy-Authorization.
    """

    def __init__(self, targets: dict[str, tuple[str, int]]) -> None:
        self.asked: list[str] = []
        self.logins: list[str] = []
        self._targets = targets
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data:
                return
            head += data
        lines = head.decode("latin-1").split("\r\n")
        method, address, version = lines[0].split()
        host = address if method == "CONNECT" else urlsplit(address).netloc
        self.asked.append(lines[0])
        self.logins += [line.partition(": ")[2] for line in lines if line.lower().startswith("proxy-authorization")]
        if host not in self._targets:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if method == "CONNECT":
            upstream = socket.create_connection(self._targets[host])
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            parts = urlsplit(address)
            upstream = socket.create_connection(self._targets[host])
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            # One request a connection: the next one on it may be for another host.
            kept = [line for line in lines[1:] if not line.lower().startswith(("connection", "proxy-"))]
            upstream.sendall("\r\n".join([f"{method} {path} {version}", "Connection: close", *kept]).encode("latin-1"))
        _relay(client, upstream)


class HttpFront(_Listener):
    """Passes requests on to a port of this machine, one on each connection, and can break answers off.

    Attributes:
        seen: Method, path and Range header of each request.
        before: Called with method and path before a request is passed on.
        cuts: How many answers with more than `cut_after` bytes are still to be broken off after so many.
    """

    def __init__(self, port: int, *, before: Callable[[str, str], object] = lambda *_: None) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.before = before
        self.cuts = 0
        self.cut_after = 2**20
        self._target = port
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            received = client.recv(65536)
            if not received:
                return
            data += received
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        wanted = next((line[7:] for line in lines if line.lower().startswith("range: ")), "")
        self.seen.append((method, path, wanted))
        self.before(method, path)
        kept = [line for line in lines if not line.lower().startswith("connection")]
        with socket.create_connection(("127.0.0.1", self._target)) as upstream:
            passed = "\r\n".join([first, "Connection: close", *kept])
            upstream.sendall(passed.encode("latin-1") + b"\r\n\r\n" + body)
            if self.cuts:
                sent = 0
                while answer := upstream.recv(65536):
                    client.sendall(answer)
                    sent += len(answer)
                    if sent > self.cut_after:
                        self.cuts -= 1
                        return
            else:
                _relay(client, upstream)


class TlsFront(_Listener):
    """Accepts TLS for 127.0.0.1 and passes the plain bytes on to a port."""

    def __init__(self, port: int, certificate: Path) -> None:
        self._target = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        super().__init__(scheme="https")

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(client, server_side=True) as secure:
            _relay(secure, socket.create_connection(("127.0.0.1", self._target)))


def private_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and names, signed by an authority of its own; returns (chain with key, authority)."""
    now = dt.datetime.now(dt.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    subjects = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("Test authority", "server")]
    certificates = []
    for number in range(2):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subjects[number])
            .issuer_name(subjects[0])
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[number].public_key()), critical=False)
        )
        if number == 1:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            alternatives = [address, *(x509.DNSName(name) for name in names)]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
            builder = builder.add_extension(issuer, critical=False)
        certificates.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain, authority = folder / "server.pem", folder / "authority.pem"
    chain.write_bytes(certificates[1] + key)
    authority.write_bytes(certificates[0])
    return chain, authority


def _relay(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError), other:
        while True:
            pending = isinstance(one, ssl.SSLSocket) and one.pending()
            ready = [one] if pending else select.select([one, other], [], [], 60)[0]
            if not ready:
                return
            for source in ready:
                data = source.recv(262144)
                if not data:
                    return
                (other if source is one else one).sendall(data)
