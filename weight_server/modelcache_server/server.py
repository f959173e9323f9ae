"""The weight server: its parts put together, started and stopped."""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.core import Metric

from modelcache_server.access import TokenVerifier
from modelcache_server.activation import ActivationWatch
from modelcache_server.admission import Admission
from modelcache_server.arena import Arena
from modelcache_server.cache import BlockCache
from modelcache_server.catalog import Catalog, Origin, VolumeOrigin
from modelcache_server.folder import FolderOrigin
from modelcache_server.grpc_lane import GrpcServer, Links, WeightsService
from modelcache_server.http_server import HttpServer
from modelcache_server.hub_revisions import hub_repo_ids
from modelcache_server.hub_routes import HubRoutes
from modelcache_server.metrics import Metrics, build_info, gauge, total
from modelcache_server.reader import BlockReader
from modelcache_server.redis_tier import RedisTier
from modelcache_server.routes import Authorize, LaneRoutes, SnapshotRoutes
from modelcache_server.settings import ServerSettings
from modelcache_server.status_routes import StatusRoutes
from modelcache_server.store import BlobStore
from modelcache_server.tls import Certificates
from modelcache_volume import BLOCK_BYTES

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Addresses:
    """Where a started server listens: ports on the host of its settings."""

    grpc: int
    http: int
    status: int


class Server:
    """A weight server over one volume, or over a plain folder, which is read once to know its checksums.

    Raises:
        VolumeError: the root cannot be served.
        ServerError: certificates, key set or Redis URL make no sense, or there is no memory for the cache.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._authorize: Authorize = TokenVerifier(settings.tokens) if settings.tokens else _open_to_all
        self._certificates = Certificates(settings.tls) if settings.tls else None
        self._origin = _origin(settings)
        self._metrics = Metrics()
        self._redis = RedisTier(settings.redis) if settings.redis else None
        self._arena = Arena(settings.cache_bytes)
        self._cache = BlockCache(self._arena)
        self._store = BlobStore(shared=self._redis, observe=self._metrics.loaded)
        self._admission = Admission(
            settings.inflight_bytes or settings.cache_bytes * 3 // 4, observe=self._metrics.queued
        )
        self._reader = BlockReader(
            self._cache,
            self._store,
            self._admission,
            read_ahead=settings.read_ahead,
            queue_seconds=settings.queue_seconds,
        )
        self._catalog = Catalog(self._origin, lease_holder=settings.lease_holder)
        self._grpc = GrpcServer(max_streams=settings.max_streams)
        self._watch = ActivationWatch(
            self._origin,
            self._catalog,
            self._cache,
            self._reader,
            warmup_bytes=settings.warmup_bytes,
            poll_seconds=settings.poll_seconds,
            prepare=self._take_memory,
            on_first=self._tell_health,
        )
        private = settings.tokens is not None
        self._http = HttpServer(
            LaneRoutes(
                SnapshotRoutes(self._catalog, self._authorize, private=private),
                HubRoutes(self._catalog, self._authorize, private=private, https=settings.tls is not None),
            ),
            lane="http",
            limits=settings.http,
            observe=self._metrics.served,
            reader=self._reader,
            tls=self._certificates.context if self._certificates else None,
            congestion_control=settings.congestion_control,
        )
        self._status = HttpServer(
            StatusRoutes(self._unready, self._metrics.render, self._announced_digest),
            lane="status",
            limits=settings.http,
            observe=_unobserved,
        )
        self._service: WeightsService | None = None
        self._started = False
        self._stopping = False
        self._metrics.add_state(self._state)

    def start(self) -> Addresses:
        """Listen on all ports. Bytes are served at once; `wait_ready` tells when the warm-up is over.

        Raises:
            ServerError: a port is in use; nothing is left running.
        """
        settings = self.settings
        try:
            if self._redis is not None:
                self._redis.start()
            status = self._status.start(settings.host, settings.status_port)
            self._watch.start()
            http = self._http.start(settings.host, settings.http_port)
            grpc_port = self._grpc.listen(
                settings.host, settings.grpc_port, self._certificates.credentials() if self._certificates else None
            )
            self._service = WeightsService(
                self._catalog,
                self._reader,
                self._authorize,
                self._metrics.served,
                Links(http, settings.tls is not None),
                max_streams=settings.max_streams,
            )
            self._grpc.start(self._service)
            self._started = True
        except BaseException:
            self.stop(grace=0)
            raise
        _log.info("listening host=%s grpc=%d http=%d status=%d", settings.host, grpc_port, http, status)
        return Addresses(grpc_port, http, status)

    def wait_ready(self, seconds: float) -> bool:
        """Wait until what is active is announced; False if it is not after `seconds`."""
        return self._watch.announced.wait(seconds)

    @property
    def hub_repo_id(self) -> str:
        """What programs built on huggingface_hub call the model; raises RequestError while the server is not ready."""
        return hub_repo_ids(self._catalog.active())[0]

    @property
    def problem(self) -> str:
        """Why the server is not ready; empty when it is."""
        return self._unready()

    def stop(self, grace: float = 10.0) -> None:
        """Turn unready, serve on for `drain_seconds`, then finish what runs within `grace` seconds."""
        self._stopping = True
        self._grpc.set_serving(serving=False)
        if self._started:
            time.sleep(self.settings.drain_seconds)
        ending = threading.Thread(target=self._grpc.stop, args=(grace,), name="grpc-stop")
        ending.start()
        self._http.stop(grace)
        ending.join()
        self._watch.stop()
        self._reader.close()
        if self._redis is not None:
            self._redis.close()
        self._status.stop(grace=1.0)
        self._store.close()
        self._cache.close()
        self._arena.close()

    def _unready(self) -> str:
        if self._stopping:
            return "stopping"
        return "" if self._watch.announced.is_set() else self._watch.problem

    def _take_memory(self) -> None:
        self._arena.prefault()
        _, huge = self._arena.page_use()
        if huge < self._arena.size:
            _log.warning(
                "only %d of the cache's %d MiB are in huge pages: reads cost more CPU. "
                "Let /sys/kernel/mm/transparent_hugepage/enabled say madvise or always.",
                huge >> 20,
                self._arena.size >> 20,
            )

    def _announced_digest(self) -> str:
        announced = self._catalog.announced
        return announced.snapshot.digest if announced is not None else ""

    def _tell_health(self) -> None:
        if not self._stopping:
            self._grpc.set_serving(serving=True)

    def _state(self) -> Iterable[Metric]:
        used, pinned = self._cache.occupancy()
        resident, huge = self._arena.page_use()
        counters = self._cache.counters
        yield build_info()
        yield gauge("ready", "1 when ready.", not self._unready())
        yield gauge("arena_size_bytes", "Size of the block cache.", self._arena.size)
        yield gauge("arena_used_bytes", "Slots that hold a block, in bytes.", used * BLOCK_BYTES)
        yield gauge("arena_pinned_bytes", "Slots that are being sent or filled, in bytes.", pinned * BLOCK_BYTES)
        yield gauge("arena_resident_bytes", "Memory that the arena takes now.", resident)
        yield gauge("arena_huge_bytes", "Part of it in huge pages.", huge)
        yield gauge("in_flight_bytes", "Bytes being sent.", self._admission.in_flight)
        yield gauge("waiting_requests", "Requests that wait for their turn.", self._admission.waiting)
        yield gauge("http_connections", "Open connections of the HTTP lane.", self._http.connections)
        yield gauge("grpc_streams", "Reads in progress.", self._service.streams if self._service else 0)
        hits, misses = {"memory": counters.hits}, {"memory": counters.misses}
        if self._redis is not None:
            seen = self._redis.counters
            hits["redis"], misses["redis"] = seen.hits, seen.misses + seen.wrong
            yield total("redis_wrong_values", "Values in Redis that were not the block.", {"": seen.wrong})
            yield total("redis_failures", "Calls that Redis failed.", {"": seen.failures})
            yield total(
                "redis_writes", "Blocks offered to Redis.", {"written": seen.written, "dropped": seen.dropped}, "result"
            )
        yield total("cache_hits", "Blocks asked of a tier that it had.", hits, "tier")
        yield total("cache_misses", "Blocks asked of a tier that it had not.", misses, "tier")
        yield total("cache_evictions", "Blocks that left a tier for others.", {"memory": counters.evictions}, "tier")
        yield total("failed_loads", "Loads that failed.", {"": counters.failed_loads})
        yield total("loaded_ahead", "Blocks loaded before they were asked for.", {"": counters.loaded_ahead})
        yield total("activations", "Revisions announced.", {"": self._watch.activations})
        yield total("lease_failures", "Leases that could not be renewed.", {"": self._catalog.lease_failures})
        announced = self._catalog.announced
        if announced is not None:
            yield gauge("active_generation", "Generation of the active revision.", announced.active.generation)


def _origin(settings: ServerSettings) -> Origin:
    if settings.name or (settings.root / "FORMAT").exists() or not settings.root.is_dir():
        return VolumeOrigin(settings.root, settings.name)
    return FolderOrigin(settings.root)


def _open_to_all(authorization: str | None) -> None:
    del authorization


def _unobserved(served: object) -> None:
    """Probes and scrapes are no requests that anybody wants counted."""
    del served
