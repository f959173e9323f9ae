"""A real Redis for tests, on a free port, in memory only."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import redis

from support.processes import Child
from support.server_volume import HOST, wait_until


@dataclass
class RedisServer:
    """A running redis-server."""

    port: int
    process: Child

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        with redis.Redis(host=HOST, port=self.port, single_connection_client=True) as client:
            yield client


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def start_redis(port: int | None = None, *options: str) -> RedisServer:
    port = port or free_port()
    command = ["redis-server", "--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no", *options]
    return RedisServer(port, Child(command))


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    server = start_redis(None, *options)
    with server.process:
        server.process.wait_for("Ready to accept connections")
        yield server


def wait_for_keys(server: RedisServer, count: int) -> None:
    with server.client() as client:
        wait_until(lambda: client.dbsize() >= count, f"redis never held {count} blocks")
