"""/healthz, /readyz and /metrics, for kubelets and Prometheus; never behind tokens."""

from collections.abc import Callable

from modelcache_server.http_connection import Reply
from modelcache_server.http_message import Request

_TEXT = (("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store"))


class StatusRoutes:
    """Answers on the status port.

    Args:
        unready: why the server is not ready, as a sentence; empty when it is.
        metrics: (Content-Type, body) of the metrics.
    """

    def __init__(self, unready: Callable[[], str], metrics: Callable[[], tuple[str, bytes]]) -> None:
        self._unready = unready
        self._metrics = metrics

    def __call__(self, request: Request, client: str) -> Reply:
        """Answer a request."""
        del client
        if request.method not in {"GET", "HEAD"}:
            return Reply(405, (("Allow", "GET, HEAD"),), error="METHOD_NOT_ALLOWED")
        if request.path == "/healthz":
            return Reply(200, _TEXT, b"ok\n")
        if request.path == "/readyz":
            why = self._unready()
            return Reply(503, _TEXT, f"{why}\n".encode()) if why else Reply(200, _TEXT, b"ok\n")
        if request.path == "/metrics":
            kind, body = self._metrics()
            return Reply(200, (("Content-Type", kind), ("Cache-Control", "no-store")), body)
        return Reply(404, _TEXT, b"try /healthz, /readyz or /metrics\n", "NOT_FOUND")
