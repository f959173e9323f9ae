"""What is in the cache before a server says that it is ready, and what the cache's metrics tell of it."""

import threading

import grpc
import pytest

from modelcache_server.store import BlobStore
from modelcache_volume import BLOCK_BYTES
from modelcache_wire.v1 import weights_pb2
from support.cli import make_folder, serving, write_manifest
from support.fetching import safetensors_bytes
from support.server_volume import MIB, make_volume, metric_of, nothing_left_behind, random_bytes, reason_of, running
from support.serving import ServerProcess

# In the order of their paths: two blocks, twenty of a single small block, three blocks; and a file outside the arena.
LARGE, SHORT = 5 * MIB, 300 * 1024
FILES = {
    "a.bin": random_bytes(LARGE, 1),
    "config.json": b"{}",
    **{f"m{n:02}.bin": random_bytes(SHORT, 10 + n) for n in range(20)},
    "z.bin": random_bytes(9 * MIB, 2),
}
ALL = sum(len(content) for path, content in FILES.items() if path != "config.json")


@pytest.fixture(autouse=True)
def _tidy():
    with nothing_left_behind():
        yield


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return make_volume(tmp_path_factory.mktemp("warm") / "volume", FILES)


@pytest.mark.parametrize(
    ("asked", "warm"),
    [
        (None, ALL),
        (0, 0),
        (1, BLOCK_BYTES),
        (BLOCK_BYTES, BLOCK_BYTES),
        (BLOCK_BYTES + 1, LARGE),
        (LARGE + 1, LARGE + SHORT),
        (LARGE + 10 * SHORT, LARGE + 10 * SHORT),
        (100 * MIB, ALL),
    ],
)
def test_so_many_of_the_first_bytes_are_warm_before_ready_and_no_block_more(volume, asked, warm):
    with running(volume[0].root, warmup_bytes=asked, read_ahead=0, cache_bytes=128 * MIB) as server:
        loaded = server.metric('loaded_bytes_total{tier="volume"}') if warm else 0
        assert loaded == warm
        left = asked if asked is not None else ALL
        for path, content in FILES.items():
            if path != "config.json" and left > 0:
                taken = content[:left]
                assert server.file(volume[1].digest, path, Range=f"bytes=0-{len(taken) - 1}").body == taken
                left -= len(taken)
        assert server.metric('cache_misses_total{tier="memory"}') == 0


def test_a_warm_up_stops_where_the_cache_is_full(tmp_path):
    volume, _ = make_volume(tmp_path / "volume", {"model.bin": random_bytes(72 * MIB)})
    for asked in (None, 70 * MIB):
        with running(volume.root, warmup_bytes=asked) as server:
            assert server.metric("arena_used_bytes") == 64 * MIB
            assert server.metric('cache_evictions_total{tier="memory"}') == 0


def test_a_server_is_not_ready_while_it_warms_up_and_serves_bytes_all_the_same(volume, monkeypatch):
    gate = threading.Event()
    load = BlobStore.load

    def held_back(store, file, block, view):
        assert file.path == "a.bin" or gate.wait(20)
        load(store, file, block, view)

    monkeypatch.setattr(BlobStore, "load", held_back)
    with running(volume[0].root, ready=False) as server, server.stub() as stub:
        try:
            answer = server.status("/readyz")
            assert (answer.status, answer.body) == (503, b"the cache is being warmed up\n")
            assert server.metric("ready") == 0
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetRevision(weights_pb2.GetRevisionRequest())
            assert reason_of(caught.value) == "NOT_READY"
            assert server.file(volume[1].digest, "a.bin").body == FILES["a.bin"]
        finally:
            gate.set()
        assert server.server.wait_ready(20)
        assert server.metric("ready") == 1


def test_the_programs_option_warms_that_much(volume):
    with ServerProcess.over(volume[0].root, "--warmup", "5Mi", "--cache-size", "64Mi") as program:
        assert metric_of(program.status_port, 'loaded_bytes_total{tier="volume"}') == LARGE


@pytest.mark.parametrize(("server", "warm"), [({"warmupSize": "5Mi"}, 2), ({"warmup": False}, 0), ({}, 3)])
def test_the_manifests_field_warms_that_much(tmp_path, server, warm):
    folder = make_folder(tmp_path / "source", {"model.safetensors": safetensors_bytes({"a": 9 * MIB})})
    manifest = write_manifest(tmp_path / "mc.yaml", f"file://{folder}", server={"cacheSize": "64Mi", **server})
    with serving("up", "-f", manifest, "--volume", tmp_path / "volume", ready=tmp_path / "ready.json") as (_, reached):
        port = int(reached["metrics"].rpartition(":")[2].partition("/")[0])
        assert metric_of(port, "arena_used_bytes") == warm * BLOCK_BYTES


def test_hits_misses_and_evictions_are_told_by_tier(tmp_path):
    data = random_bytes(72 * MIB)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": data})

    def counts(server) -> tuple[float, ...]:
        names = ("hits", "misses", "evictions")
        return tuple(server.metric(f'cache_{name}_total{{tier="memory"}}') for name in names)

    with running(volume.root, warmup_bytes=0, read_ahead=0) as server:
        assert counts(server) == (0, 0, 0)
        assert server.file(snapshot.digest, "model.bin", Range=f"bytes=0-{2 * BLOCK_BYTES - 1}").status == 206
        assert counts(server) == (0, 2, 0)
        assert server.file(snapshot.digest, "model.bin", Range="bytes=5-9").body == data[5:10]
        assert counts(server) == (1, 2, 0)
        assert server.file(snapshot.digest, "model.bin").body == data
        assert counts(server) == (3, 18, 2)
        with pytest.raises(AssertionError, match="no metric"):
            server.metric('cache_hits_total{tier="redis"}')
