"""What Prometheus sees, under one prefix, with bounded labels."""

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from modelcache_server.http_connection import Served

_access_log = logging.getLogger("modelcache_server.access")
_SECONDS = (0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 30.0)
_METHODS = frozenset({"GET", "HEAD", "GetRevision", "GetManifest", "Read"})


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests answered.", "lane", "method", "code")
        self._errors = self._counter("errors", "Requests that failed, by reason.", "lane", "reason")
        self._sent = self._counter("sent_bytes", "Bytes sent to clients.", "lane")
        self._latency = self._histogram(
            "request_duration_seconds", "From a request's head to its last byte.", "lane", "method"
        )
        self._load = self._histogram("load_duration_seconds", "Loading one block or small file, verified.", "tier")
        self._loaded = self._counter("loaded_bytes", "Bytes loaded, by tier.", "tier")
        self._queue = self._histogram("queue_duration_seconds", "Waiting for a turn to send, of those that had to.")
        # Finding a metric by its labels costs more than counting.
        self._of_request = functools.cache(self._find_of_request)

    def served(self, served: Served) -> None:
        """Count a request and write its line in the access log."""
        method = served.method if served.method in _METHODS else "other"
        requests, latency, sent = self._of_request(served.lane, method, served.status)
        requests.inc()
        latency.observe(served.seconds)
        sent.inc(served.sent_bytes)
        if served.error:
            self._errors.labels(served.lane, served.error).inc()
        if _access_log.isEnabledFor(logging.INFO):
            _access_log.info(
                "request",
                extra={
                    "fields": {
                        "lane": served.lane,
                        "method": served.method,
                        "target": served.target,
                        "code": served.status,
                        "reason": served.error,
                        "bytes": served.sent_bytes,
                        "seconds": round(served.seconds, 6),
                        "client": served.client,
                        "request_id": served.request_id,
                    }
                },
            )

    def loaded(self, tier: str, seconds: float, size: int) -> None:
        """Count a loaded block."""
        self._load.labels(tier).observe(seconds)
        self._loaded.labels(tier).inc(size)

    def queued(self, seconds: float) -> None:
        """Note how long a request waited for its turn."""
        self._queue.observe(seconds)

    def add_state(self, state: Callable[[], Iterable[Metric]]) -> None:
        """Ask `state` for more metrics whenever they are scraped."""
        self.registry.register(_State(state))

    def render(self) -> tuple[str, bytes]:
        """(Content-Type, body) for Prometheus."""
        return CONTENT_TYPE_LATEST, generate_latest(self.registry)

    def _find_of_request(self, lane: str, method: str, status: str) -> tuple[Counter, Histogram, Counter]:
        return self._requests.labels(lane, method, status), self._latency.labels(lane, method), self._sent.labels(lane)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"modelcache_server_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"modelcache_server_{name}", text, labels, registry=self.registry, buckets=_SECONDS)


class _State:
    def __init__(self, state: Callable[[], Iterable[Metric]]) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        """Nothing beforehand: asking for the state would need a started server."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The metrics of now."""
        return self._state()


def gauge(name: str, text: str, value: float) -> Metric:
    """A value of now."""
    return GaugeMetricFamily(f"modelcache_server_{name}", text, value=value)


def total(name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
    """A count since the start, by one label (or, under the empty key, without)."""
    family = CounterMetricFamily(f"modelcache_server_{name}", text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def build_info() -> Metric:
    """The program's version."""
    family = InfoMetricFamily("modelcache_server_build", "The running program.")
    family.add_metric([], {"version": importlib.metadata.version("modelcache")})
    return family
