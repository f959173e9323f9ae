"""Blocks in Redis, shared by replicas. Whatever Redis does or holds can cost speed, never a byte."""

import logging
import queue
import threading
import time
from dataclasses import dataclass

import crc32c
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from modelcache_server.cache import BlockKey
from modelcache_server.errors import ServerError
from modelcache_server.settings import RedisSettings

_log = logging.getLogger(__name__)
_PREFIX = "modelcache:1"
_CONNECTIONS = 16
_QUEUED_WRITES = 8  # blocks of 4 MiB; more are dropped: the next miss offers them again
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0


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
            value = self._redis.get(_name(key))
        except redis.ResponseError as error:
            # Another type under our key, or no right to read it: Redis itself works.
            self.counters.wrong += 1
            _log.warning("redis gives no block: %s", error)
            return False
        except (redis.RedisError, OSError) as error:
            self._failed(error)
            return False
        self._works()
        if value is None:
            self.counters.misses += 1
            return False
        if not isinstance(value, bytes) or len(value) != len(view) or crc32c.crc32c(value) != crc:
            self.counters.wrong += 1
            _log.warning("redis holds other bytes for block %d of %s", key.block, key.sha256.hex())
            return False
        view[:] = value
        self.counters.hits += 1
        return True

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


def _name(key: BlockKey) -> str:
    return f"{_PREFIX}:{key.sha256.hex()}:{key.block}"
