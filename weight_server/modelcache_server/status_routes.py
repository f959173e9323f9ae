"""/healthz, /readyz, /metrics and /active, for kubelets, Prometheus and the operator; never behind tokens."""

import json
from collections.abc import Callable

from modelcache_server.http_connection import Reply
from modelcache_server.http_message import Request

_TEXT = (("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store"))


class StatusRoutes:
    """Answers on the status port.

    Args:
        unready: why the server is not ready, as a sentence; empty when it is.
        metrics: (Content-Type, body) of the metrics.
        announced: digest of the snapshot that clients are told is active; empty while there is none.
    """

    def __init__(
        self, unready: Callable[[], str], metrics: Callable[[], tuple[str, bytes]], announced: Callable[[], str]
    ) -> None:
        self._unready = unready
        self._metrics = metrics
        self._announced = announced

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
        if request.path == "/active":
            body = json.dumps({"digest": self._announced()}).encode()
            return Reply(200, (("Content-Type", "application/json"), ("Cache-Control", "no-store")), body)
        return Reply(404, _TEXT, b"try /healthz, /readyz, /metrics or /active\n", "NOT_FOUND")
