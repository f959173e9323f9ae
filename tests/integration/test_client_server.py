"""The client against the real weight server and a really fetched volume."""

import contextlib
import hashlib
import mmap
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import BertModel

import modelcache
from modelcache import IntegrityError, StreamingBertModel, grpc_lane
from modelcache.address import parse_endpoint
from modelcache.deadline import Deadline
from modelcache.lane import LaneBroken
from modelcache.plan import select_tensors
from modelcache.security import Security
from modelcache.volume_lane import VolumeSource
from modelcache_volume import Volume
from support.client_server import FaultyServer
from support.models import BASE, TINY, BertFiles, cached_bert, minilm, save_bert
from support.processes import Child
from support.server_security import AUDIENCE, ISSUER, Issuer, write_certificate
from support.server_volume import flip_bit
from support.serving import ServerProcess, fetch_folder

MEDIUM = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
IDS = torch.randint(0, 96, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def over_the_wire(monkeypatch):
    """The volume is on this machine, and would be used directly."""
    monkeypatch.setenv("MODELCACHE_VOLUME", "off")


@pytest.fixture
def folder(tmp_path):
    return save_bert(tmp_path / "model", BertFiles(config=MEDIUM, data_offset=24))


@pytest.fixture
def volume(tmp_path, folder):
    fetch_folder(folder, tmp_path / "volume", "bert")
    return tmp_path / "volume"


def outputs(model, ids=IDS):
    with torch.no_grad():
        found = model(ids)
    return found.last_hidden_state, found.pooler_output


def same(model, folder, ids=IDS):
    wanted = outputs(BertModel.from_pretrained(folder), ids)
    return all(torch.equal(left, right) for left, right in zip(outputs(model, ids), wanted, strict=True))


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start(volume, ports, host="127.0.0.1"):
    grpc_port, http_port = ports
    return ServerProcess.module(
        "modelcache_server",
        volume,
        "--host",
        host,
        "--port",
        str(grpc_port),
        "--http-port",
        str(http_port),
        "--status-port",
        "0",
    )


@pytest.mark.usefixtures("over_the_wire")
@pytest.mark.parametrize("data_offset", [0, 8, 16, 24])
def test_bert_base_is_equal_over_http(tmp_path, data_offset):
    folder = cached_bert(BertFiles(config=BASE, data_offset=data_offset))
    fetch_folder(folder, tmp_path / "volume", "bert")
    ids = torch.arange(1000, 1024).view(1, 24)
    wanted = outputs(BertModel.from_pretrained(folder), ids)
    with ServerProcess.over(tmp_path / "volume") as server:
        for cache_size in (1, 3, None):
            with StreamingBertModel("bert", cache_size, address=server.address) as model:
                for _ in range(2):
                    assert all(torch.equal(*each) for each in zip(outputs(model, ids), wanted, strict=True))
                assert model.get_inference_stats()["lane"] == "http"


@pytest.mark.usefixtures("over_the_wire")
def test_minilm_is_equal_and_its_tokenizer_comes_along(tmp_path):
    fetch_folder(minilm(), tmp_path / "volume", "minilm")
    with ServerProcess.over(tmp_path / "volume") as server:
        files = modelcache.snapshot(
            "minilm", ignore_patterns="*.safetensors", address=server.address, local_dir=tmp_path / "f"
        )
        assert (files / "tokenizer.json").read_bytes() == (minilm() / "tokenizer.json").read_bytes()
        with StreamingBertModel("minilm", address=server.address) as model:
            assert same(model, minilm(), torch.arange(2000, 2032).view(2, 16))


@pytest.fixture
def nothing_on_the_wire(volume):
    """A server that tells of a volume on this machine and has no bytes itself."""
    (snapshot,) = Volume.open(volume).snapshots()
    server = FaultyServer()
    server.active, server.manifests[snapshot.digest] = snapshot.digest, snapshot.manifest
    server.volume_path = str(volume)
    with server:
        yield server
    assert server.requests == []


@pytest.fixture(params=["the same file system", "another file system"])
def target(request, tmp_path):
    if request.param == "the same file system":
        yield tmp_path / "files"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev
        yield Path(other) / "files"


def test_files_of_a_volume_on_this_machine_are_copies(nothing_on_the_wire, volume, folder, target):
    modelcache.snapshot("bert", address=nothing_on_the_wire.address, local_dir=target)
    (snapshot,) = Volume.open(volume).snapshots()
    for file in snapshot.manifest.files:
        copy = target / file.path
        assert copy.read_bytes() == (folder / file.path).read_bytes()
        assert not copy.is_symlink()
        assert copy.stat().st_nlink == 1
        with copy.open("r+b") as written:
            written.write(b"what its owner writes")
    assert snapshot.verify() == []


def test_a_damaged_volume_gives_no_file(nothing_on_the_wire, volume, target):
    (snapshot,) = Volume.open(volume).snapshots()
    weights = next(file for file in snapshot.manifest.files if file.path == "model.safetensors")
    flip_bit(snapshot.blob_path(weights), weights.size // 2)
    with pytest.raises(IntegrityError, match=r"model\.safetensors .*--verify"):
        modelcache.snapshot("bert", address=nothing_on_the_wire.address, local_dir=target)
    assert not [path.name for path in target.iterdir() if "safetensors" in path.name]


def test_a_volume_of_this_machine_is_used_instead_of_the_wire(volume, folder):
    with ServerProcess.over(volume) as server:
        for cache_size in (1, None):
            with StreamingBertModel("bert", cache_size, address=server.address) as model:
                assert same(model, folder)
                assert same(model, folder)
                assert model.get_inference_stats()["lane"] == "volume"
        state = modelcache.load_state_dict("bert", address=server.address)
        plain = BertModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items())


def test_a_mounted_volume_is_named_by_the_environment(volume, folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "mounted"
    elsewhere.symlink_to(volume)
    monkeypatch.setenv("MODELCACHE_VOLUME", str(elsewhere))
    with ServerProcess.over(volume) as server, StreamingBertModel("bert", address=server.address) as model:
        assert same(model, folder)
        assert model.get_inference_stats()["lane"] == "volume"


def test_a_damaged_volume_is_found_before_a_wrong_number_is_computed(volume):
    with ServerProcess.over(volume) as server:
        snapshot = Volume.open(volume).snapshots()[0]
        tensor = next(each for each in snapshot.manifest.tensors if "layer.3.output.dense.weight" in each.name)
        flip_bit(snapshot.blob_path(snapshot.manifest.files[tensor.file]), tensor.offset + 17)
        with StreamingBertModel("bert", address=server.address) as model, pytest.raises(IntegrityError) as caught:
            model(IDS)
    assert caught.value.tensor == tensor.name


def test_a_mapped_file_that_was_cut_off_is_an_error_and_no_crash(volume):
    (snapshot,) = Volume.open(volume).snapshots()
    weights = next(file for file in snapshot.manifest.files if file.path == "model.safetensors")
    source = VolumeSource(snapshot)
    source.map(weights.path)
    os.truncate(snapshot.blob_path(weights), 2 * mmap.PAGESIZE)
    with pytest.raises(IntegrityError, match=r"model\.safetensors .*--verify"):
        source.check(select_tensors(snapshot.manifest))


@pytest.mark.usefixtures("over_the_wire")
def test_a_bit_that_flips_on_the_servers_disk_never_reaches_a_result(volume):
    snapshot = Volume.open(volume).snapshots()[0]
    tensor = next(each for each in snapshot.manifest.tensors if "layer.3.output.dense.weight" in each.name)
    flip_bit(snapshot.blob_path(snapshot.manifest.files[tensor.file]), tensor.offset + 17)
    with ServerProcess.over(volume) as server, StreamingBertModel("bert", address=server.address) as model:
        for _ in range(2):
            with pytest.raises(IntegrityError):
                model(IDS)


@pytest.mark.usefixtures("over_the_wire")
def test_a_server_killed_in_the_middle_is_resumed_when_it_is_back(volume, folder):
    ports = free_ports(2)
    with start(volume, ports) as server:
        model = StreamingBertModel("bert", 1, address=f"127.0.0.1:{ports[0]}", timeout=60)
        assert same(model, folder)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    results = []
    running = threading.Thread(target=lambda: results.append(same(model, folder)))
    running.start()
    with start(volume, ports):
        running.join()
        model.cleanup()
    assert results == [True]


@pytest.mark.usefixtures("over_the_wire")
def test_a_pinned_model_keeps_reading_its_own_digest_over_two_changes(volume, folder, tmp_path):
    with ServerProcess.over(volume) as server, StreamingBertModel("bert", 1, address=server.address) as model:
        assert same(model, folder)
        model._session.keeper.renew()
        for seed in (1, 2):
            newer = save_bert(tmp_path / f"newer{seed}", BertFiles(config=MEDIUM, seed=seed))
            fetch_folder(newer, volume, "bert")
            assert same(model, folder)
        model._session.keeper.renew()
        assert model.digest in Volume.open(volume).leased()
        newest = Volume.open(volume).active("bert").digest
        deadline = time.monotonic() + 20
        while model.digest != newest:
            model.refresh()  # The server may have announced the one in between first.
            assert time.monotonic() < deadline
        assert same(model, newer)


CLIENT_OF_A_NAME = """
import hashlib, sys, torch, modelcache

ids = torch.tensor(eval(sys.argv[2]))
with modelcache.StreamingBertModel("bert", 1, address=sys.argv[1], timeout=60) as model, torch.no_grad():
    for line in sys.stdin:
        if line == "refresh\\n":
            print("refreshed", model.refresh(), flush=True)
        else:
            print("result", hashlib.sha256(model(ids).pooler_output.numpy()).hexdigest(), flush=True)
"""


def client_of_a_name(hosts, port, script=CLIENT_OF_A_NAME):
    """A program that finds bert-weights.test in a hosts file of its own."""
    in_namespace = ("unshare", "--mount", "--", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts)
    return Child([*in_namespace, sys.executable, "-c", script, f"bert-weights.test:{port}", str(IDS.tolist())])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a mount namespace in which a name can move")
@pytest.mark.usefixtures("over_the_wire")
def test_a_name_that_moves_to_another_address_is_followed(volume, folder, tmp_path):
    """As when a server's pod is replaced: the client sees a name, here that of a hosts file of its own."""
    ports = free_ports(2)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 bert-weights.test\n")
    wanted = hashlib.sha256(outputs(BertModel.from_pretrained(folder))[1].numpy()).hexdigest()
    with contextlib.ExitStack() as closing:
        before = closing.enter_context(start(volume, ports))
        model = closing.enter_context(client_of_a_name(hosts, ports[0]))
        model.send("run")
        assert model.wait_for("result (.*)")[1] == wanted
        after = closing.enter_context(start(volume, ports, "127.0.0.2"))
        hosts.write_text("127.0.0.2 bert-weights.test\n")
        for _ in range(3):
            model.send("run")
        before.kill()
        for _ in range(3):
            assert model.wait_for("result (.*)")[1] == wanted
        model.send("refresh")
        assert model.wait_for("refreshed (.*)")[1] == "False"
        after.kill()  # It would still wait for clients that have not heard.


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a mount namespace with a name of its own")
@pytest.mark.usefixtures("over_the_wire")
def test_a_replica_whose_bytes_do_not_come_is_left_for_another_of_its_name(folder, tmp_path):
    """It answers with the head of each response, as where only large packets are lost."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 bert-weights.test\n127.0.0.2 bert-weights.test\n")
    wanted = hashlib.sha256(outputs(BertModel.from_pretrained(folder))[1].numpy()).hexdigest()
    impatient = "import modelcache.http_lane; modelcache.http_lane.STALL_SECONDS = 5\n"
    port, http_port = free_ports(2)
    first, second = FaultyServer(folder), FaultyServer(folder)
    with (
        first.start(port, http_port=http_port),
        second.start(port, host="127.0.0.2", http_port=http_port),
        client_of_a_name(hosts, port, impatient + CLIENT_OF_A_NAME.replace("timeout=60", "timeout=9")) as model,
    ):
        model.send("run")
        assert model.wait_for("result (.*)")[1] == wanted
        silent, other = (first, second) if first.requests else (second, first)
        assert not other.requests
        silent.hold.clear()
        for _ in range(2):
            model.send("run")
            assert model.wait_for("result (.*)")[1] == wanted
        assert other.requests


@pytest.mark.parametrize("asked", ["manifest", "bytes"])
def test_a_frozen_server_is_given_up_over_grpc_before_the_deadline(volume, monkeypatch, asked):
    sooner = tuple((name, value // 12 if name.endswith(("keepalive_time_ms", "_timeout_ms")) else value)
                   for name, value in grpc_lane._OPTIONS)  # fmt: skip
    monkeypatch.setattr(grpc_lane, "_OPTIONS", sooner)
    with ServerProcess.over(volume) as server:
        lane = grpc_lane.GrpcLane(parse_endpoint(server.address), Security())
        manifest = lane.manifest("", Deadline(30))
        server.process.send_signal(signal.SIGSTOP)
        stream = lane.open(manifest.digest, "model.safetensors", 0, 1000, Deadline(30))
        with pytest.raises(LaneBroken, match="timeout"):
            stream.read_into(memoryview(bytearray(1000))) if asked == "bytes" else lane.manifest("", Deadline(30))
        lane.close()
        server.kill()


@pytest.mark.slow
@pytest.mark.usefixtures("over_the_wire")
@pytest.mark.timeout(900)  # As many server starts, each seconds on a busy machine.
def test_200_passes_under_random_kills_of_two_replicas_are_all_equal(volume, folder):
    ports = [free_ports(2) for _ in range(2)]
    servers = [start(volume, each).__enter__() for each in ports]
    wanted = outputs(BertModel.from_pretrained(folder))
    stop = threading.Event()
    chance = random.Random(0)

    def kill_and_restart():
        while not stop.wait(chance.uniform(0.05, 0.3)):
            index = chance.randrange(2)
            servers[index].kill()
            servers[index] = start(volume, ports[index]).__enter__()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    longest = 0.0
    try:
        with StreamingBertModel(
            "bert", 1, address=",".join(f"127.0.0.1:{each[0]}" for each in ports), timeout=60
        ) as model:
            for _ in range(200):
                started = time.monotonic()
                assert all(torch.equal(left, right) for left, right in zip(outputs(model), wanted, strict=True))
                longest = max(longest, time.monotonic() - started)
    finally:
        stop.set()
        killer.join()
        for server in servers:
            server.kill()
    assert longest < 60


@pytest.mark.usefixtures("over_the_wire")
@pytest.mark.parametrize("by_environment", [True, False])
def test_tls_and_a_token_that_is_rotated(volume, folder, tmp_path, monkeypatch, by_environment):
    certificate, key = write_certificate(tmp_path)
    issuer = Issuer()
    issuer.add_ec("key")
    options = ("--tls-cert", str(certificate), "--tls-key", str(key), "--token-key-set",
               str(issuer.publish(tmp_path / "jwks.json")), "--token-issuer", ISSUER, "--token-audience", AUDIENCE,
               "--allow", "default/reader")  # fmt: skip
    token = tmp_path / "token"
    token.write_text(issuer.token() + "\n")
    given = {"token_file": token, "ca_file": certificate}
    if by_environment:
        monkeypatch.setenv("MODELCACHE_TOKEN_FILE", str(token))
        monkeypatch.setenv("MODELCACHE_CA_FILE", str(certificate))
        given = {}
    with ServerProcess.over(volume, *options) as server:
        address = f"https://localhost:{server.grpc_port}"
        with StreamingBertModel("bert", 1, address=address, **given) as model:
            assert same(model, folder)
            assert model.get_inference_stats()["lane"] == "http"
            token.write_text(issuer.token(aud=["another"]))
            model.clear_cache()
            with pytest.raises(modelcache.AccessDenied):
                model(IDS)
            token.write_text(issuer.token())
            assert same(model, folder)


@pytest.mark.usefixtures("over_the_wire")
def test_a_certificate_that_is_not_trusted_is_never_used(volume, tmp_path):
    certificate, key = write_certificate(tmp_path)
    with (
        ServerProcess.over(volume, "--tls-cert", str(certificate), "--tls-key", str(key)) as server,
        pytest.raises(modelcache.NotReady),
    ):
        StreamingBertModel("bert", address=f"https://localhost:{server.grpc_port}", wait_timeout=1.5)
