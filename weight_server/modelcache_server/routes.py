"""What the HTTP lane answers: files of snapshots by digest, and the Hub's API. Pure: requests in, replies out."""

from collections.abc import Callable

from modelcache_server.catalog import Catalog
from modelcache_server.errors import Reason, RequestError
from modelcache_server.file_reply import file_reply
from modelcache_server.http_connection import App, Reply
from modelcache_server.http_message import Request

Authorize = Callable[[str | None], None]
"""Lets a request with this Authorization header through, or raises RequestError."""

SNAPSHOTS = "/v1/snapshots"


def read_only() -> Reply:
    """The answer to every method that would write."""
    headers = (("Allow", "GET, HEAD"), ("Content-Type", "text/plain"))
    return Reply(405, headers, b"read only\n", "METHOD_NOT_ALLOWED")


class LaneRoutes:
    """The HTTP lane: /v1/snapshots for ModelCache's own client, everything else for the Hub's clients."""

    def __init__(self, snapshots: App, hub: App) -> None:
        self._snapshots = snapshots
        self._hub = hub

    def __call__(self, request: Request, client: str) -> Reply:
        """Answer a request."""
        own = request.path.startswith(SNAPSHOTS) and request.path[len(SNAPSHOTS) :][:1] in {"", "/"}
        return (self._snapshots if own else self._hub)(request, client)


class SnapshotRoutes:
    """GET and HEAD /v1/snapshots/DIGEST/PATH. The path is looked up in the manifest; it never names a file on disk."""

    def __init__(self, catalog: Catalog, authorize: Authorize, *, private: bool) -> None:
        """`private` says that answers are for their receiver only and no proxy may keep them."""
        self._catalog = catalog
        self._authorize = authorize
        scope = "private" if private else "public"
        self._cache_control = ("Cache-Control", f"{scope}, max-age=31536000, immutable")

    def __call__(self, request: Request, client: str) -> Reply:
        """Answer a request."""
        del client
        self._authorize(request.headers.get("authorization"))
        if request.method not in {"GET", "HEAD"}:
            return read_only()
        match request.segments():
            case ["v1", "snapshots", digest, first, *rest]:
                snapshot = self._catalog.get(digest)
                file = snapshot.file("/".join([first, *rest]))
                self._catalog.renew_lease(digest)
                wanted = request.headers.get("range")
                return file_reply(request, file, file.sha256.hex(), (self._cache_control,), wanted)
            case _:
                raise RequestError(Reason.NO_SUCH_FILE, "Files are at /v1/snapshots/DIGEST/PATH.")
