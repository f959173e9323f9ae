"""The server from Python, as Surfing Weights' users call it, over a volume and over a plain folder."""

import asyncio
import http.client
import json
import os
import struct

import grpc
import pytest

from modelcache_server import AdvancedWeightServer, Server, ServerSettings, WeightServer
from modelcache_volume import BadWeights, VolumeError
from modelcache_wire.framing import join_manifest
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
from support.server_redis import redis_server, wait_for_keys
from support.server_volume import HOST, MIB, flip_bit, make_volume, nothing_left_behind, random_bytes, running

PORTS = {"port": 0, "http_port": 0, "status_port": 0, "host": HOST}


@pytest.fixture(autouse=True)
def _tidy():
    with nothing_left_behind():
        yield


def safetensors(size: int = 5 * MIB) -> bytes:
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random_bytes(size, 3)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "unet" / "config.json").write_bytes(b"{}")
    (folder / ".git" / "secret").write_bytes(b"secret")
    (tmp_path / "outside").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "inner").symlink_to("unet/config.json")
    return folder


def get(port: int, digest: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", f"/v1/snapshots/{digest}/{path}")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def manifest_of(port: int):
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        stub = weights_pb2_grpc.WeightsStub(channel)
        return join_manifest(reply.part for reply in stub.GetManifest(weights_pb2.GetManifestRequest()))


def test_a_plain_folder_is_served_with_its_tensors_and_without_what_is_hidden_or_outside(folder):
    with WeightServer(model_path=folder, cache_size_mb=64, **PORTS) as server:
        manifest = manifest_of(server.addresses.grpc)
        assert [file.path for file in manifest.files] == ["inner", "model.safetensors", "unet/config.json"]
        assert [tensor.name for tensor in manifest.tensors] == ["weight"]
        assert get(server.addresses.http, manifest.digest, "model.safetensors") == (200, safetensors())
        assert get(server.addresses.http, manifest.digest, "inner") == (200, b"{}")


def test_a_snapshot_in_a_hugging_face_cache_is_served_through_its_links(tmp_path):
    commit = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    commit.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_bytes(safetensors())
    (commit / "model.safetensors").symlink_to("../../blobs/f00")
    with WeightServer(commit, **PORTS) as server:
        manifest = manifest_of(server.addresses.grpc)
        assert get(server.addresses.http, manifest.digest, "model.safetensors") == (200, safetensors())


def test_a_file_that_changes_under_the_server_is_served_no_more(folder):
    with running(folder, warmup_bytes=0) as server:
        digest = manifest_of(server.addresses.grpc).digest
        flip_bit(folder / "model.safetensors", 4 * MIB + 5)
        assert server.file(digest, "model.safetensors", Range=f"bytes={4 * MIB}-").status == 500
        os.truncate(folder / "unet" / "config.json", 1)
        assert server.file(digest, "unet/config.json").status == 500


def test_folders_that_cannot_be_served_are_refused_at_once(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(VolumeError, match="nothing to serve"):
        WeightServer(empty)
    with pytest.raises(VolumeError):
        WeightServer(tmp_path / "missing")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BadWeights, match=r"broken\.safetensors"):
        WeightServer(folder)
    for folders in ({}, {"model_path": folder, "chunks_dir": folder}):
        with pytest.raises(ValueError, match="one folder"):
            WeightServer(**folders)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cache_size_mb": 0},
        {"cache_size_mb": -1},
        {"cache_size_mb": "64"},
        {"port": 65536},
        {"http_port": -1},
        {"status_port": "9091"},
        {"port": True},
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(folder, arguments):
    (argument,) = arguments
    with pytest.raises(ValueError, match=f"^{argument} "):
        WeightServer(folder, **arguments)


def fetched_while_started(server: WeightServer, path: str) -> bytes:
    """What a server gives out between `await server.start_server()` and the end of that task."""

    async def main() -> bytes:
        task = asyncio.create_task(server.start_server())
        while True:
            await asyncio.sleep(0.01)
            try:
                addresses = server.addresses
                break
            except RuntimeError:
                assert not task.done()
        assert await asyncio.to_thread(server._server.wait_ready, 30)
        manifest = await asyncio.to_thread(manifest_of, addresses.grpc)
        status, body = await asyncio.to_thread(get, addresses.http, manifest.digest, path)
        assert status == 200
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return body

    return asyncio.run(main())


@pytest.mark.parametrize("argument", ["model_path", "chunks_dir"])
def test_start_server_serves_a_folder_or_a_volume_until_its_task_is_cancelled(tmp_path, folder, argument):
    volume, _ = make_volume(tmp_path / "volume", {"model.safetensors": safetensors(MIB)})
    whole = WeightServer(**{argument: str(folder)}, cache_size_mb=100, **PORTS)
    assert fetched_while_started(whole, "model.safetensors") == safetensors()
    whole = WeightServer(**{argument: str(volume.root)}, cache_size_mb=100, **PORTS)
    assert fetched_while_started(whole, "model.safetensors") == safetensors(MIB)


def test_start_server_of_the_advanced_server_serves_a_folder_or_a_volume(tmp_path, folder):
    volume, _ = make_volume(tmp_path / "volume", {"model.safetensors": safetensors(MIB)})
    with redis_server() as redis:
        options = {"redis_url": redis.url, "cache_size_mb": 64, **PORTS}
        server = AdvancedWeightServer(chunks_dir=str(folder), **options)
        assert fetched_while_started(server, "model.safetensors") == safetensors()
        server = AdvancedWeightServer(chunks_dir=str(volume.root), **options)
        assert fetched_while_started(server, "model.safetensors") == safetensors(MIB)
        wait_for_keys(redis, 3)


def test_the_advanced_server_shares_its_blocks(tmp_path):
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": random_bytes(5 * MIB)})
    with (
        redis_server() as redis,
        AdvancedWeightServer(chunks_dir=volume.root, redis_url=redis.url, cache_size_mb=64, **PORTS) as server,
    ):
        assert get(server.addresses.http, snapshot.digest, "model.bin") == (200, random_bytes(5 * MIB))
        wait_for_keys(redis, 2)


def test_a_server_that_is_made_and_never_started_leaves_nothing(folder):
    server = Server(ServerSettings(root=folder, cache_bytes=64 * MIB))
    server.stop(grace=0)
