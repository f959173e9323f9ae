"""Blocks in Redis, shared by replicas. Whatever Redis does or holds can cost speed, never a byte."""

import logging
import queue
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import crc32c
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from modelcache_server.cache import BlockKey
from modelcache_server.errors import ServerError
from modelcache_server.settings import RedisSettings
from modelcache_server.streams import timeval

_log = logging.getLogger(__name__)
_PREFIX = "modelcache:1"
_CONNECTIONS = 16
_QUEUED_WRITES = 8  # blocks of 4 MiB; more are dropped: the next miss offers them again
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_MISS = b"$-1\r\n"
_WRONG_TYPE = b"-WRONGTYPE"


class _Answer(Enum):
    """What a GET brought."""

    VALUE = auto()
    MISS = auto()
    OTHER = auto()  # a value of another size or type


@dataclass
class RedisCounters:
    """Counts since the start."""

    hits: int = 0
    misses: int = 0
    wrong: int = 0  # values that were not the block
    failures: int = 0  # time-outs, refusals, lost connections
    written: int = 0
    dropped: int = 0


class RedisTier:
    """A SharedTier. After a failure Redis is left alone for a while, so that each reader does not wait for a time-out.

    Raises:
        ServerError: The URL makes no sense. (A Redis that cannot be reached is no error.)
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        try:
            pool = redis.BlockingConnectionPool.from_url(
                settings.url,
                max_connections=_CONNECTIONS,
                timeout=settings.timeout_seconds,
                socket_timeout=settings.timeout_seconds,
                socket_connect_timeout=settings.timeout_seconds,
                protocol=2,  # its replies are all that comes: RESP3 has pushes between them
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ServerError("The Redis URL is not one: write redis://, rediss:// or unix://.") from error
        self._redis = redis.Redis(connection_pool=pool)
        self.counters = RedisCounters()
        self._lock = threading.Lock()
        self._pause = _FIRST_PAUSE_SECONDS
        self._resume_at = 0.0
        self._writes: queue.Queue[tuple[str, bytes] | None] = queue.Queue(_QUEUED_WRITES)
        self._writer = threading.Thread(target=self._write, name="redis-writer", daemon=True)

    def start(self) -> None:
        """Begin to write what is offered."""
        self._writer.start()

    def fetch(self, key: BlockKey, crc: int, view: memoryview) -> bool:
        """As SharedTier.fetch: the value is compared with the manifest's checksum before it is taken."""
        if time.monotonic() < self._resume_at:
            return False
        try:
            answer = self._get_into(_name(key), view)
        except (redis.RedisError, OSError) as error:
            self._failed(error)
            return False
        self._works()
        if answer is _Answer.MISS:
            self.counters.misses += 1
            return False
        if answer is _Answer.OTHER or crc32c.crc32c(view) != crc:
            self.counters.wrong += 1
            _log.warning("redis holds other bytes for block %d of %s", key.block, key.sha256.hex())
            return False
        self.counters.hits += 1
        return True

    def _get_into(self, name: str, view: memoryview) -> _Answer:
        """GET a value of `len(view)` bytes straight into `view`, within the time-out.

        redis-py opens and authenticates the connection; the reply is read here, since its parser gathers it from
        pieces of 64 KiB and copies it twice: a sixth of the speed with four loaders.

        Raises:
            redis.RedisError, OSError: it did not come in time, or the connection broke.
        """
        deadline = time.monotonic() + self._settings.timeout_seconds
        pool = self._redis.connection_pool
        connection: Any = pool.get_connection()  # half of its methods have no types
        usable = False
        try:
            connection.send_command("GET", name)
            answer = _receive_value(connection._sock, view, deadline)  # noqa: SLF001 - it has no public name
            usable = answer is not _Answer.OTHER
        finally:
            if not usable:
                connection.disconnect()  # what is left of the reply must not be taken for the next one
            pool.release(connection)
        return answer

    def offer(self, key: BlockKey, view: memoryview) -> None:
        """As SharedTier.offer: written behind, or dropped when Redis does not keep up."""
        if time.monotonic() < self._resume_at or self._writes.full():
            self.counters.dropped += 1
            return
        try:
            self._writes.put_nowait((_name(key), bytes(view)))
        except queue.Full:
            self.counters.dropped += 1

    def close(self) -> None:
        """Write what is queued, as far as Redis takes it, and hang up."""
        if self._writer.ident is not None:
            self._writes.put(None)
            self._writer.join()
        self._redis.close()
        self._redis.connection_pool.disconnect()

    def _write(self) -> None:
        ending = False
        while not ending:
            batch = [self._writes.get()]
            while not self._writes.empty():
                batch.append(self._writes.get())
            ending = None in batch
            blocks = [entry for entry in batch if entry is not None]
            if not blocks or time.monotonic() < self._resume_at:
                self.counters.dropped += len(blocks)
                continue
            try:
                with self._redis.pipeline(transaction=False) as pipeline:
                    for name, value in blocks:
                        pipeline.set(name, value, ex=self._settings.ttl_seconds)
                    # Raised, an error would have the whole command in its text, and take seconds to write it.
                    results = pipeline.execute(raise_on_error=False)
            except (redis.RedisError, OSError) as error:
                self.counters.dropped += len(blocks)
                self._failed(error)
            else:
                self._count_written(results)

    def _count_written(self, results: list[object]) -> None:
        refused = [result for result in results if isinstance(result, Exception)]
        self.counters.written += len(results) - len(refused)
        self.counters.dropped += len(refused)
        self.counters.failures += len(refused)
        if refused:
            # Out of memory, or not allowed to write: what is there can still be read.
            _log.warning("redis refused %d of %d blocks: %s", len(refused), len(results), type(refused[0]).__name__)

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.counters.failures += 1
            now = time.monotonic()
            if now < self._resume_at:
                return  # another thread saw it first
            self._resume_at = now + self._pause
            # The type only: messages of connection errors may contain the URL.
            _log.warning("redis failed, next try in %.0f s: %s", self._pause, type(error).__name__)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)

    def _works(self) -> None:
        if self._pause != _FIRST_PAUSE_SECONDS:
            with self._lock:
                self._pause = _FIRST_PAUSE_SECONDS


def _receive_value(sock: socket.socket, view: memoryview, deadline: float) -> _Answer:
    """Read the reply to a GET (RESP2: `$SIZE`, the bytes, each followed by CR LF).

    Raises:
        redis.ResponseError: Redis refuses: no password, no right, not yet loaded.
    """
    expected = b"$%d\r\n" % len(view)
    head = bytearray(len(_MISS))
    _receive(sock, memoryview(head), deadline)
    if head == _MISS:
        return _Answer.MISS
    if head.startswith(b"-") and not _WRONG_TYPE.startswith(head):
        raise redis.ResponseError
    if not expected.startswith(head):
        return _Answer.OTHER
    rest = bytearray(len(expected) - len(head))
    _receive(sock, memoryview(rest), deadline)
    if head + rest != expected:
        return _Answer.OTHER
    _receive(sock, view, deadline)
    end = bytearray(2)
    _receive(sock, memoryview(end), deadline)
    return _Answer.VALUE if end == b"\r\n" else _Answer.OTHER


def _receive(sock: socket.socket, view: memoryview, deadline: float) -> None:
    # Blocking, with the kernel's time-out: then one call takes megabytes. TLS gives a record at a time in any case.
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    while view:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if flags:
            sock.setblocking(True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(left))
        else:
            sock.settimeout(left)
        try:
            count = sock.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError from None
        if not count:
            raise ConnectionError("redis closed the connection")
        view = view[count:]


def _name(key: BlockKey) -> str:
    return f"{_PREFIX}:{key.sha256.hex()}:{key.block}"
