"""The client under servers that break, vanish, move, damage bytes or roll their revision."""

import contextlib
import http.server
import logging
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from transformers import BertModel

import modelcache
from modelcache import Cancelled, IntegrityError, NotReady, RevisionGone, StreamingBertModel, Unavailable
from modelcache.address import Endpoint
from modelcache.connection import connect
from modelcache.deadline import Deadline
from modelcache.grpc_lane import GrpcLane
from modelcache.lane import LaneBroken
from modelcache.lease import LeaseKeeper
from modelcache.security import Security
from support.cli import run_cli
from support.client_server import FaultyServer
from support.models import TINY, BertFiles, save_bert
from support.server_security import write_certificate

LARGER = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    return save_bert(tmp_path / "model", BertFiles(config=LARGER, data_offset=24))


@pytest.fixture
def server(folder):
    with FaultyServer(folder) as server:
        yield server


def same(found, folder):
    with torch.no_grad():
        wanted = BertModel.from_pretrained(folder)(IDS)
    return torch.equal(found.last_hidden_state, wanted.last_hidden_state) and torch.equal(
        found.pooler_output, wanted.pooler_output
    )


def weights_start(server):
    manifest = server.manifests[server.active]
    return min(tensor.offset for tensor in manifest.tensors)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_connections_that_break_are_resumed_without_reading_a_byte_twice(server, folder):
    server.cut_after, server.cuts = 300_000, 20
    with StreamingBertModel("x", None, address=server.address) as model:
        assert same(model(IDS), folder)
        assert server.cuts < 20
        read = model.get_inference_stats()["bytes_received"]
    total = sum(tensor.length for tensor in server.manifests[server.active].tensors)
    assert read == total


def test_bytes_damaged_once_are_read_again(server, folder):
    server.flips = {weights_start(server) + at: 1 for at in (1000, 400_000, 3_000_000)}
    with StreamingBertModel("x", address=server.address) as model:
        assert same(model(IDS), folder)
    assert not any(server.flips.values())


def test_bytes_damaged_twice_raise_in_the_forward_pass(server):
    last = max(server.manifests[server.active].tensors, key=lambda tensor: tensor.offset)
    server.flips = {last.offset + 5: 10**6}
    with StreamingBertModel("x", address=server.address) as model, pytest.raises(IntegrityError) as caught:
        model(IDS)
    assert caught.value.tensor == last.name


def _another_name(tensor):
    tensor.name = tensor.name[:-1] + chr(ord(tensor.name[-1]) ^ 1)


def _another_file(tensor):
    tensor.file ^= 64


@pytest.mark.parametrize(
    ("damage", "checksums", "said"),
    [
        (_another_name, True, "arrived damaged"),
        (_another_file, False, "contradicts itself: the tensor .* names a file"),
    ],
)
def test_a_manifest_that_arrives_damaged_is_read_again(server, folder, monkeypatch, damage, checksums, said):
    server.damage, server.manifest_checksums = damage, checksums
    server.damaged_manifests = 2
    with StreamingBertModel("test", address=server.address) as model:
        assert same(model(IDS), folder)
    server.damaged_manifests = 10**6
    monkeypatch.setattr("modelcache.connection._MANIFEST_SECONDS", 1.0)
    with pytest.raises(Unavailable, match=said):
        StreamingBertModel("test", address=server.address)


def test_bytes_come_over_grpc_where_only_that_port_is_reachable(server, folder):
    server.http = False
    with StreamingBertModel("x", address=server.address) as model:
        assert same(model(IDS), folder)
        assert model.get_inference_stats()["lane"] == "grpc"


def test_a_server_that_comes_back_is_used_again(folder):
    server = FaultyServer(folder).start()
    with StreamingBertModel("x", 1, address=server.address, timeout=60) as model:
        assert same(model(IDS), folder)
        server.stop()
        results = []
        waiting = threading.Thread(target=lambda: results.append(model(IDS)))
        waiting.start()
        back = FaultyServer(folder).start(server.port)
        waiting.join()
        back.stop()
    assert same(results[0], folder)


def test_a_server_that_stays_away_is_one_clear_error_within_the_deadline(folder):
    server = FaultyServer(folder).start()
    with StreamingBertModel("x", 1, address=server.address, timeout=1.0) as model:
        model(IDS)
        server.stop()
        model.clear_cache()
        with pytest.raises(Unavailable, match=r"within 1 s\. Last: .*[^.]\. Check that it runs"):
            model(IDS)
        assert model.get_cache_info()["cached_components"] == []


def test_no_more_is_promised_of_a_whole_load_that_broke_off_than_is_so(folder):
    """What had arrived of it is read again, so the error may not say that it is kept."""
    with FaultyServer(folder) as server:
        server.seconds_per_mib = 0.2
        with pytest.raises(Unavailable, match=r"within 0\.5 s\. .*reached; the call can be repeated\.$"):
            modelcache.load_state_dict("x", address=server.address, timeout=0.5)
        server.seconds_per_mib = 0.0
        before = len(server.requests)
        modelcache.load_state_dict("x", address=server.address)
        again = sum(length for *_, length in server.requests[before:])
        assert again >= sum(tensor.length for tensor in server.manifests[server.active].tensors)


def test_another_replica_takes_over_in_the_middle_of_a_layer(folder):
    first, second = FaultyServer(folder).start(), FaultyServer(folder).start()
    with StreamingBertModel("x", 1, address=f"{first.address},{second.address}") as model:
        assert same(model(IDS), folder)
        first.stop()
        for _ in range(3):
            assert same(model(IDS), folder)
        assert second.requests
    second.stop()


def test_a_revision_rolled_in_the_middle_changes_nothing_until_refresh(server, folder, tmp_path):
    newer = save_bert(tmp_path / "newer", BertFiles(config=LARGER, seed=7))
    with StreamingBertModel("x", 1, address=server.address) as model:
        assert same(model(IDS), folder)
        pinned = model.digest
        active = server.publish(newer, commit="b" * 40)
        assert same(model(IDS), folder)
        assert model.digest == pinned
        assert model.refresh()
        assert model.digest == active
        assert same(model(IDS), newer)
        assert not model.refresh()


def test_a_revision_rolled_during_a_forward_pass_changes_nothing_in_it(server, folder, tmp_path):
    newer = save_bert(tmp_path / "newer", BertFiles(config=LARGER, seed=7))
    found = []
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(IDS)
        model.clear_cache()
        before = len(server.requests)
        server.hold.clear()
        running = threading.Thread(target=lambda: found.append(model(IDS)))
        running.start()
        server.wait_for_request(before)
        server.publish(newer, commit="b" * 40)
        refreshed = threading.Thread(target=model.refresh)
        refreshed.start()
        server.hold.set()
        running.join()
        refreshed.join()
        assert same(found[0], folder)
        assert same(model(IDS), newer)


def test_a_model_that_is_cleaned_up_during_a_refresh_leaves_nothing_open(server, folder, tmp_path):
    newer = save_bert(tmp_path / "newer", BertFiles(config=LARGER, seed=7))
    model = StreamingBertModel("x", address=server.address)
    assert same(model(IDS), folder)
    server.publish(newer, commit="b" * 40)
    before = len(server.requests)
    server.hold.clear()
    with ThreadPoolExecutor(1) as threads:
        refreshed = threads.submit(model.refresh)
        server.wait_for_request(before)
        model.cleanup()
        server.hold.set()
        with pytest.raises(Cancelled):
            refreshed.result(timeout=60)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("modelcache-")]
    with pytest.raises(Cancelled):
        model(IDS)


def test_a_refresh_waits_for_a_server_that_is_away_and_then_says_so(folder):
    server = FaultyServer(folder).start()
    with StreamingBertModel("x", 1, address=server.address) as model:
        server.stop()
        with pytest.raises(Unavailable, match=r"within 0.5 s.*[Rr]efused"):
            model.refresh(timeout=0.5)
        results = []
        waiting = threading.Thread(target=lambda: results.append(model.refresh(timeout=60)))
        waiting.start()
        with FaultyServer(folder).start(server.port):
            waiting.join()
    assert results == [False]


def test_a_pruned_revision_is_said_so_and_refresh_helps(server, folder, tmp_path):
    newer = save_bert(tmp_path / "newer", BertFiles(config=LARGER, seed=7))
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(IDS)
        pinned = model.digest
        server.publish(newer, commit="b" * 40)
        server.remove(pinned)
        with pytest.raises(RevisionGone, match=r"refresh\(\)"):
            model(IDS)
        model.refresh()
        assert same(model(IDS), newer)


def test_the_lease_of_the_pinned_digest_is_renewed(server):
    snapshot = connect("x", address=server.address)
    keeper = LeaseKeeper(snapshot, seconds=0.01)
    renewed = threading.Event()
    server.renewed = type(
        "Seen", (list,), {"append": lambda self, digest: (list.append(self, digest), renewed.set())}
    )()
    assert renewed.wait(10)
    assert server.renewed[0] == server.active
    keeper.close()
    assert not keeper._thread.is_alive()
    snapshot.close()


def test_a_forgotten_lease_ends_its_thread(server):
    with connect("x", address=server.address) as snapshot:
        keeper = LeaseKeeper(snapshot)
        thread = keeper._thread
        del keeper
        thread.join(10)
        assert not thread.is_alive()


def test_a_client_waits_for_a_server_that_is_not_ready_and_says_why(folder, caplog, monkeypatch):
    monkeypatch.setattr("modelcache.connection._SAY_SECONDS", 0.0)
    port = free_port()
    models = []
    said = threading.Event()

    class Said(logging.Handler):
        def emit(self, record):
            if "Waiting for bert-tiny" in record.getMessage() and "NOT_READY" in record.getMessage():
                said.set()

    handler = Said()
    logging.getLogger("modelcache").addHandler(handler)
    waiting = threading.Thread(
        target=lambda: models.append(StreamingBertModel("bert-tiny", address=f"127.0.0.1:{port}", wait_timeout=60))
    )
    waiting.start()
    server = FaultyServer(folder)
    server.ready = False
    with server.start(port):
        assert said.wait(30)
        server.ready = True
        waiting.join()
        with models[0] as model:
            assert same(model(IDS), folder)
    logging.getLogger("modelcache").removeHandler(handler)


def test_a_server_that_never_comes_is_not_ready():
    with pytest.raises(NotReady, match=r"kubectl describe modelcache bert-tiny"):
        StreamingBertModel("bert-tiny", address=f"127.0.0.1:{free_port()}", wait_timeout=0.5)


def test_a_server_that_is_ready_needs_no_waiting(server, folder):
    with StreamingBertModel("test", address=server.address, wait_timeout=0) as model:
        assert same(model(IDS), folder)
    server.ready = False
    with pytest.raises(NotReady, match=r"after 0 s: .*still fetching"):
        StreamingBertModel("test", address=server.address, wait_timeout=0)


def test_why_a_server_never_came_is_said():
    with pytest.raises(NotReady, match=r"[Rr]efused"):
        StreamingBertModel("bert-tiny", address=f"127.0.0.1:{free_port()}", wait_timeout=1.5)


@pytest.mark.parametrize("tls", [False, True])
def test_a_port_without_grpc_or_with_tls_is_said(tmp_path, tls):
    listener = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*write_certificate(tmp_path))
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
    with listener:
        answering = threading.Thread(target=listener.serve_forever, args=(0.01,))
        answering.start()
        try:
            with pytest.raises(NotReady, match="gRPC's port, 9090, after https:// if it has TLS"):
                StreamingBertModel("bert-tiny", address=f"127.0.0.1:{listener.server_port}", wait_timeout=1.5)
        finally:
            listener.shutdown()
            answering.join()


def test_a_server_may_take_half_a_second_to_greet():
    """Over a slow line, with TLS, or because it is busy: it is not hung up on meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lane = GrpcLane(Endpoint("127.0.0.1", listener.getsockname()[1]), Security())
        with contextlib.closing(lane), ThreadPoolExecutor(1) as pool:
            asking = pool.submit(lane.revision, "", Deadline(20))
            listener.settimeout(20)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    b"".join(iter(lambda: connection.recv(4096), b""))
            with pytest.raises(LaneBroken):
                asking.result(20)


@pytest.mark.parametrize(
    ("tls", "scheme", "says"),
    [
        (True, "", "gRPC's port, 9090, after https:// if it has TLS"),
        (True, "https://", "signed by an authority in ca_file= or MODELCACHE_CA_FILE"),
        (False, "https://", "speaks no TLS: leave https:// out"),
    ],
    ids=["asked without", "not trusted", "has none"],
)
def test_what_is_wrong_with_tls_is_said(tmp_path, tls, scheme, says):
    service = grpc.server(ThreadPoolExecutor(1))
    chain, key = write_certificate(tmp_path)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
    port = service.add_secure_port("127.0.0.1:0", credentials) if tls else service.add_insecure_port("127.0.0.1:0")
    service.start()
    try:
        with pytest.raises(NotReady, match=says):
            StreamingBertModel("bert-tiny", address=f"{scheme}127.0.0.1:{port}", wait_timeout=1.5)
        waiting = run_cli("wait", "--address", f"{scheme}127.0.0.1:{port}", "--timeout", "1s")
    finally:
        service.stop(None).wait()
    assert waiting.returncode == 86
    assert says in waiting.stderr


def test_another_name_than_the_servers_is_said(server, caplog):
    StreamingBertModel("something-else", address=server.address).cleanup()
    assert "something-else" in caplog.text


def test_a_repository_must_be_the_one_that_is_served(server):
    with pytest.raises(modelcache.AddressError, match="serves 'org/name', not 'other/model'"):
        StreamingBertModel("other/model", address=server.address)
    StreamingBertModel("org/name", address=server.address).cleanup()


def test_cleanup_in_the_middle_of_a_read_ends_it(server):
    errors = []
    model = StreamingBertModel("x", 1, address=server.address)
    model(IDS)
    server.hold.clear()

    def run():
        try:
            for _ in range(100):
                model(IDS)
        except modelcache.Cancelled as error:
            errors.append(error)

    before = len(server.requests)
    thread = threading.Thread(target=run)
    thread.start()
    server.wait_for_request(before)
    model.cleanup()
    thread.join(20)
    assert errors
