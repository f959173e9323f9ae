"""What Prometheus sees of the operator, and its health, on one port."""

from collections.abc import Callable, Iterable, Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

Key = tuple[str, str]


class Metrics:
    """All metrics of one operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "modelcache_operator_reconciles", "Reconciles, by result.", ["result"], registry=self.registry
        )
        self.seconds = Histogram(
            "modelcache_operator_reconcile_seconds",
            "Duration of a reconcile.",
            registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        )
        self.leading = Gauge("modelcache_operator_leading", "1 while this replica leads.", registry=self.registry)
        self._model_caches: dict[Key, tuple[dict[str, bool], float]] = {}
        self.registry.register(_ModelCaches(self._model_caches))

    def observe(self, queue_length: Callable[[], int], calls: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Ask for these whenever metrics are scraped."""
        Gauge("modelcache_operator_queue_length", "Keys ready to run.", registry=self.registry).set_function(
            queue_length
        )
        self.registry.register(_Calls(calls))

    def model_cache(self, key: Key, status: Mapping[str, object]) -> None:
        """Show a ModelCache's conditions and size."""
        conditions, size = status.get("conditions"), status.get("bytes")
        shown = {c["type"]: c["status"] == "True" for c in conditions} if isinstance(conditions, list) else {}
        self._model_caches[key] = shown, size if isinstance(size, int) else 0

    def forget(self, key: Key) -> None:
        """The ModelCache is gone."""
        self._model_caches.pop(key, None)


class _ModelCaches:
    """Makes the samples when they are asked for: a gauge for each would be most of what a restart keeps in memory."""

    def __init__(self, found: Mapping[Key, tuple[Mapping[str, bool], float]]) -> None:
        self._found = found

    def describe(self) -> list[GaugeMetricFamily]:
        """The two metrics, without samples."""
        return [
            GaugeMetricFamily(
                "modelcache_condition",
                "1 while a condition of a ModelCache is True, else 0.",
                labels=["namespace", "name", "condition"],
            ),
            GaugeMetricFamily("modelcache_active_bytes", "Size of the active snapshot.", labels=["namespace", "name"]),
        ]

    def collect(self) -> Iterable[Metric]:
        """Of every ModelCache as it was written last."""
        conditions, size = self.describe()
        for key, (shown, size_bytes) in self._found.items():
            for condition, holds in shown.items():
                conditions.add_metric([*key, condition], holds)
            size.add_metric(key, size_bytes)
        return conditions, size


class _Calls:
    def __init__(self, calls: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._calls = calls

    def describe(self) -> list[Metric]:
        """The one metric, without samples."""
        return [
            CounterMetricFamily("modelcache_operator_api_calls", "Calls of the API server.", labels=["verb", "what"])
        ]

    def collect(self) -> Iterable[Metric]:
        """The calls made so far."""
        family = CounterMetricFamily(
            "modelcache_operator_api_calls", "Calls of the API server.", labels=["verb", "what"]
        )
        for (verb, what), count in self._calls().items():
            family.add_metric([verb, what], count)
        yield family


async def serve(metrics: Metrics, port: int, healthy: Callable[[], bool]) -> web.AppRunner:
    """Serve /metrics, /healthz and /readyz until the runner is cleaned up.

    A standby is ready too: it does what it is there for. As everywhere, ``name[]`` chooses metrics by name.
    """

    async def show(request: web.Request) -> web.Response:
        names = request.query.getall("name[]", [])
        registry = metrics.registry.restricted_registry(names) if names else metrics.registry
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def health(_: web.Request) -> web.Response:
        good = healthy()
        return web.Response(text="ok\n" if good else "the event loop's work has ended\n", status=200 if good else 503)

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/healthz", health), web.get("/readyz", health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
