"""What Prometheus sees of the operator, and its health, on one port."""

from collections.abc import Callable, Iterable, Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
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
        self._condition = Gauge(
            "modelcache_condition",
            "1 while a condition of a ModelCache is True, else 0.",
            ["namespace", "name", "condition"],
            registry=self.registry,
        )
        self._bytes = Gauge(
            "modelcache_active_bytes", "Size of the active snapshot.", ["namespace", "name"], registry=self.registry
        )
        self._known: dict[Key, tuple[str, ...]] = {}

    def observe(self, queue_length: Callable[[], int], calls: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Ask for these whenever metrics are scraped."""
        Gauge("modelcache_operator_queue_length", "Keys ready to run.", registry=self.registry).set_function(
            queue_length
        )
        self.registry.register(_Calls(calls))

    def model_cache(self, key: Key, status: Mapping[str, object]) -> None:
        """Show a ModelCache's conditions."""
        conditions = status.get("conditions")
        shown: list[str] = []
        for condition in conditions if isinstance(conditions, list) else []:
            self._condition.labels(*key, condition["type"]).set(condition["status"] == "True")
            shown.append(condition["type"])
        size = status.get("bytes")
        self._bytes.labels(*key).set(size if isinstance(size, int) else 0)
        self._known[key] = tuple(shown)

    def forget(self, key: Key) -> None:
        """The ModelCache is gone."""
        if (shown := self._known.pop(key, None)) is None:
            return
        for condition in shown:
            self._condition.remove(*key, condition)
        self._bytes.remove(*key)


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
