"""TLS and tokens on both lanes."""

import http.client
import socket
import ssl
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelcache_server import HttpLimits, Server, ServerError, ServerSettings, TlsSettings, TokenSettings
from modelcache_volume import BLOCK_BYTES
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
from support.server_security import AUDIENCE, ISSUER, Issuer, write_certificate
from support.server_volume import (
    HOST,
    MIB,
    make_volume,
    nothing_left_behind,
    random_bytes,
    read_all,
    reason_of,
    running,
    wait_until,
)

DATA = random_bytes(3 * BLOCK_BYTES + 77, 1)


@pytest.fixture(autouse=True)
def _tidy():
    with nothing_left_behind():
        yield


@pytest.fixture
def volume(tmp_path):
    return make_volume(tmp_path / "volume", {"model.bin": DATA})


@pytest.fixture
def tls(tmp_path):
    return TlsSettings(*write_certificate(tmp_path))


@pytest.fixture
def issuer():
    issuer = Issuer()
    issuer.add_ec("key")
    return issuer


@pytest.fixture
def tokens(tmp_path, issuer):
    return TokenSettings(issuer.publish(tmp_path / "jwks.json"), ISSUER, AUDIENCE, ("default/reader",))


def trusting(tls: TlsSettings) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(tls.certificate))


def https_get(server, context: ssl.SSLContext, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(HOST, server.addresses.http, context=context, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def served_certificate(port: int) -> str:
    return ssl.get_server_certificate((HOST, port), timeout=10)


def test_both_lanes_speak_tls_and_status_stays_open(volume, tls):
    with running(volume[0].root, tls=tls) as server:
        digest = volume[1].digest
        path = f"/v1/snapshots/{digest}/model.bin"
        context = trusting(tls)
        assert https_get(server, context, path) == (200, DATA)
        assert https_get(server, context, path, Range="bytes=5-5000000") == (206, DATA[5:5000001])
        credentials = grpc.ssl_channel_credentials(tls.certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{server.addresses.grpc}", credentials) as channel:
            stub = weights_pb2_grpc.WeightsStub(channel)
            assert stub.GetRevision(weights_pb2.GetRevisionRequest()).http_tls
            assert read_all(stub, digest, ("model.bin", 0, len(DATA))) == DATA
        assert server.status("/readyz").status == 200
        with pytest.raises((ConnectionError, http.client.HTTPException, TimeoutError)):
            server.ask(path)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_slow_reader_over_tls_gets_every_byte(volume, tls, version):
    with running(volume[0].root, tls=tls) as server:
        context = trusting(tls)
        context.minimum_version = context.maximum_version = version
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        plain.connect((HOST, server.addresses.http))
        with context.wrap_socket(plain, server_hostname=HOST) as client:
            path = f"/v1/snapshots/{volume[1].digest}/model.bin"
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            wait_until(lambda: server.metric("in_flight_bytes") == 0, "the stalled reader holds its share")
            received = b""
            while more := client.recv(MIB):
                received += more
        assert received.partition(b"\r\n\r\n")[2] == DATA


def test_a_replaced_certificate_is_used_without_a_restart_and_a_broken_one_is_not(volume, tls):
    with running(volume[0].root, tls=tls) as server:
        ports = (server.addresses.http, server.addresses.grpc)
        first = tls.certificate.read_text()
        for port in ports:
            assert served_certificate(port) == first
        write_certificate(tls.certificate.parent)
        second = tls.certificate.read_text()
        for port in ports:
            wait_until(lambda port=port: served_certificate(port) == second, "the new certificate is not used")
        tls.private_key.write_text("broken")
        deadline = time.monotonic() + 2.5  # longer than it takes to notice
        while time.monotonic() < deadline:
            for port in ports:
                assert served_certificate(port) == second


def test_those_who_never_finish_the_handshake_are_let_go(volume, tls):
    with running(volume[0].root, tls=tls, http=HttpLimits(header_seconds=0.5)) as server:
        with socket.create_connection((HOST, server.addresses.http), timeout=10) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection((HOST, server.addresses.http), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b"200" not in plain.recv(1000)
        wait_until(lambda: server.metric("http_connections") == 0, "not closed")


def test_certificates_that_do_not_fit_are_refused_at_the_start(volume, tls, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _, wrong_key = write_certificate(other)
    for pair in (TlsSettings(tls.certificate, wrong_key), TlsSettings(tmp_path / "missing", tls.private_key)):
        with pytest.raises(ServerError, match="belong together"):
            Server(ServerSettings(root=volume[0].root, tls=pair, cache_bytes=64 * MIB))


def test_only_allowed_accounts_read_and_probes_need_no_token(volume, tokens, issuer):
    digest = volume[1].digest
    with running(volume[0].root, tokens=tokens) as server, server.stub() as stub:
        request = weights_pb2.GetRevisionRequest()
        cases = [
            (None, 401, grpc.StatusCode.UNAUTHENTICATED),
            ("nonsense", 401, grpc.StatusCode.UNAUTHENTICATED),
            (issuer.token(seconds=-60), 401, grpc.StatusCode.UNAUTHENTICATED),
            (issuer.token(aud=["other"]), 401, grpc.StatusCode.UNAUTHENTICATED),
            (issuer.token("other/reader"), 403, grpc.StatusCode.PERMISSION_DENIED),
        ]
        for token, status, code in cases:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            answer = server.file(digest, "model.bin", **headers)
            assert answer.status == status
            assert ("www-authenticate" in answer.headers) == (status == 401)
            metadata = [("authorization", f"Bearer {token}")] if token else []
            for call in (
                lambda metadata=metadata: stub.GetRevision(request, metadata=metadata),
                lambda metadata=metadata: list(stub.GetManifest(weights_pb2.GetManifestRequest(), metadata=metadata)),
                lambda metadata=metadata: list(stub.Read(weights_pb2.ReadRequest(digest=digest), metadata=metadata)),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() is code
                assert reason_of(caught.value) == code.name
        good = f"Bearer {issuer.token()}"
        answer = server.file(digest, "model.bin", Authorization=good)
        assert (answer.status, answer.body == DATA) == (200, True)
        assert answer.headers["cache-control"].startswith("private")
        assert stub.GetRevision(request, metadata=[("authorization", good)]).active.digest == digest
        for path in ("/healthz", "/readyz", "/metrics"):
            assert server.status(path).status == 200
        with grpc.insecure_channel(f"{HOST}:{server.addresses.grpc}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_tokens_never_appear_in_logs_or_answers(volume, tokens, issuer, caplog):
    caplog.set_level("DEBUG")
    good, bad = issuer.token(), issuer.token("other/reader")
    with running(volume[0].root, tokens=tokens) as server:
        for token in (good, bad, "garbage-token"):
            answer = server.file(volume[1].digest, "model.bin", Authorization=f"Bearer {token}", Range="bytes=0-1")
            assert token.encode() not in answer.body
            assert token not in str(answer.headers)
            assert token not in caplog.text
    assert "request" in caplog.text
