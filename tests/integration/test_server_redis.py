"""The second tier: replicas share blocks, and nothing that Redis does changes a byte."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest

from modelcache_server import RedisSettings, Server, ServerError, ServerSettings
from modelcache_volume import BLOCK_BYTES
from support.server_redis import free_port, redis_server, start_redis, wait_for_keys
from support.server_security import write_certificate
from support.server_volume import HOST, MIB, make_volume, nothing_left_behind, random_bytes, running, wait_until

DATA = random_bytes(4 * BLOCK_BYTES, 1)


@pytest.fixture(autouse=True)
def _tidy():
    with nothing_left_behind():
        yield


@pytest.fixture
def volume(tmp_path):
    return make_volume(tmp_path / "volume", {"model.bin": DATA})


def replica(volume, url: str, **settings):
    redis = RedisSettings(url, ttl_seconds=100, timeout_seconds=0.5)
    return running(volume[0].root, redis=redis, warmup_bytes=0, read_ahead=0, **settings)


def body(server, volume) -> bytes:
    return server.file(volume[1].digest, "model.bin").body


def test_a_second_replica_reads_nothing_from_the_volume(volume):
    with redis_server() as redis:
        with replica(volume, redis.url) as first:
            assert body(first, volume) == DATA
            wait_for_keys(redis, 4)
        with replica(volume, redis.url) as second:
            assert body(second, volume) == DATA
            assert second.metric('load_duration_seconds_count{tier="redis"}') == 4
            assert second.metric('cache_hits_total{tier="redis"}') == 4
            with pytest.raises(AssertionError):
                second.metric('load_duration_seconds_count{tier="volume"}')
        with redis.client() as client:
            (key, *_) = client.keys()
            assert 0 < client.ttl(key) <= 100
            assert volume[1].file("model.bin").sha256.hex().encode() in key


def test_corrupted_and_foreign_values_are_noticed_and_replaced(volume):
    with redis_server() as redis, redis.client() as client:
        with replica(volume, redis.url) as first:
            assert body(first, volume) == DATA
            wait_for_keys(redis, 4)
        one, two, three, four = sorted(client.keys())
        value = bytearray(client.get(one))
        value[77] ^= 1
        client.set(one, bytes(value))
        client.set(two, b"short")
        client.delete(three)
        client.lpush(three, "a list")
        client.set(four, client.get(four) + b"x")
        with replica(volume, redis.url) as second:
            assert body(second, volume) == DATA
            assert second.metric("redis_wrong_values_total") == 4
            assert second.metric('load_duration_seconds_count{tier="volume"}') == 4


def test_without_redis_everything_is_served_and_it_is_used_once_it_is_back(volume, monkeypatch):
    monkeypatch.setattr("modelcache_server.redis_tier._FIRST_PAUSE_SECONDS", 0.1)
    with redis_server() as redis:
        port = redis.port
    with replica(volume, f"redis://127.0.0.1:{port}") as server:
        assert body(server, volume) == DATA
        assert server.metric("redis_failures_total") >= 1
        back = start_redis(port)
        with back.process:
            back.process.wait_for("Ready to accept connections")
            with back.client() as client:

                def shared() -> bool:
                    server.server._cache.retire(list(server.server._cache._entries))
                    with replica(volume, back.url) as other:
                        assert body(other, volume) == DATA
                    return client.dbsize() > 0

                wait_until(shared, "redis is not used again")
        assert body(server, volume) == DATA


def test_a_redis_that_hangs_costs_a_time_out_once(volume):
    with redis_server() as redis, replica(volume, redis.url) as server:
        os.kill(redis.process.pid, signal.SIGSTOP)
        try:
            bodies = []
            threads = [threading.Thread(target=lambda: bodies.append(body(server, volume))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert bodies == [DATA] * 4
        finally:
            os.kill(redis.process.pid, signal.SIGCONT)


def test_a_redis_without_memory_or_with_a_password_only_costs_speed(volume):
    with (
        redis_server("--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as redis,
        replica(volume, redis.url) as server,
    ):
        assert body(server, volume) == DATA
        wait_until(lambda: server.metric("redis_failures_total") > 0, "the refusal was not noticed")
    with redis_server("--requirepass", "secret") as redis:
        with replica(volume, redis.url) as server:
            assert body(server, volume) == DATA
            assert server.metric("redis_failures_total") >= 1
            assert server.metric("redis_wrong_values_total") == 0
        with replica(volume, redis.url.replace("redis://", "redis://:secret@")) as server:
            assert body(server, volume) == DATA
            wait_until(lambda: server.metric('redis_writes_total{result="written"}') == 4, "not written")


def test_blocks_that_redis_evicted_come_from_the_volume(tmp_path):
    data = random_bytes(10 * BLOCK_BYTES, 2)
    volume = make_volume(tmp_path / "large", {"model.bin": data})
    with redis_server("--maxmemory", "24mb", "--maxmemory-policy", "allkeys-lru") as redis, redis.client() as client:
        with replica(volume, redis.url) as first:
            assert body(first, volume) == data
            wait_until(lambda: client.info("stats")["evicted_keys"] > 0, "nothing was evicted")
        with replica(volume, redis.url) as second:
            (newest, *_) = sorted(client.keys(), key=lambda key: client.object("idletime", key))
            block = int(newest.rpartition(b":")[2])
            span = f"bytes={block * BLOCK_BYTES}-{(block + 1) * BLOCK_BYTES - 1}"
            answer = second.file(volume[1].digest, "model.bin", Range=span)
            assert answer.body == data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            assert second.metric('cache_hits_total{tier="redis"}') == 1
            assert body(second, volume) == data
            assert second.metric('cache_misses_total{tier="redis"}') > 0
            asked = [second.metric(f'cache_{what}_total{{tier="redis"}}') for what in ("hits", "misses")]
            assert sum(asked) == second.metric('cache_misses_total{tier="memory"}') == 10
            assert second.metric("redis_failures_total") == 0
            assert second.metric("redis_wrong_values_total") == 0


def test_a_url_without_sense_is_refused_and_never_shown(volume):
    with pytest.raises(ServerError) as caught:
        Server(ServerSettings(root=volume[0].root, cache_bytes=64 * MIB, redis=RedisSettings("http://:secret@host")))
    assert "secret" not in str(caught.value)


def test_redis_over_tls_gives_the_same_bytes(volume, tmp_path):
    chain, key = write_certificate(tmp_path)
    port = free_port()
    options = (
        "--port", "0", "--tls-port", str(port), "--tls-cert-file", str(chain), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(chain), "--tls-auth-clients", "no",
    )  # fmt: skip
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={chain}"
    server = start_redis(None, *options)
    with server.process:
        server.process.wait_for("Ready to accept connections")
        with replica(volume, url) as first:
            assert body(first, volume) == DATA
            wait_until(lambda: first.metric('redis_writes_total{result="written"}') == 4, "not written")
        with replica(volume, url) as second:
            assert body(second, volume) == DATA
            assert second.metric('load_duration_seconds_count{tier="redis"}') == 4


@pytest.mark.parametrize(
    "reply", [b"$4194304\r\n" + b"x" * 100, b"$41943040\r\n", b"+OK\r\n", b"", b"$4194304\r\n" + b"x" * BLOCK_BYTES]
)
def test_something_else_on_redis_port_costs_one_time_out(volume, reply):
    """It answers whatever it is asked with the beginning of a reply, and then with nothing more."""
    connections = []
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                with contextlib.suppress(OSError):
                    connection.recv(4096)
                    connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with replica(volume, f"redis://{HOST}:{listener.getsockname()[1]}") as server:
                start = time.monotonic()
                assert body(server, volume) == DATA
                assert time.monotonic() - start < 5
                assert server.metric('load_duration_seconds_count{tier="volume"}') == 4
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()
