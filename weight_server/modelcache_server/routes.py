"""What the HTTP lane answers: files of snapshots by digest. Pure: requests in, replies out."""

from collections.abc import Callable

from modelcache_server.catalog import Catalog
from modelcache_server.errors import Reason, RequestError
from modelcache_server.http_connection import FilePart, Reply, error_reply, without_body
from modelcache_server.http_message import Request, matches_etag, parse_range
from modelcache_server.store import ServedFile

Authorize = Callable[[str | None], None]
"""Lets a request with this Authorization header through, or raises RequestError."""


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
            return Reply(
                405, (("Allow", "GET, HEAD"), ("Content-Type", "text/plain")), b"read only\n", "METHOD_NOT_ALLOWED"
            )
        match request.segments():
            case ["v1", "snapshots", digest, first, *rest]:
                snapshot = self._catalog.get(digest)
                file = snapshot.file("/".join([first, *rest]))
                self._catalog.renew_lease(digest)
                return self._file(request, file)
            case _:
                raise RequestError(Reason.NO_SUCH_FILE, "Files are at /v1/snapshots/DIGEST/PATH.")

    def _file(self, request: Request, file: ServedFile) -> Reply:
        etag = file.sha256.hex()
        headers = (
            ("Content-Type", "application/octet-stream"),
            ("Accept-Ranges", "bytes"),
            ("ETag", f'"{etag}"'),
            self._cache_control,
        )
        whole = Reply(200, headers, FilePart(file, 0, file.size))
        known = request.headers.get("if-none-match")
        if known is not None and matches_etag(known, etag):
            return without_body(whole, 304)
        wanted = request.headers.get("range")
        condition = request.headers.get("if-range")
        if condition is not None and not matches_etag(condition, etag):
            wanted = None
        if wanted is not None and not file.size:
            # The only answer to a range of an empty file that all of the Hub's clients take.
            return Reply(200, (*headers, ("Content-Range", "bytes */0")))
        try:
            span = parse_range(wanted, file.size)
        except RequestError as error:
            if error.reason is not Reason.OUT_OF_RANGE:
                raise
            reply = error_reply(error)
            return Reply(
                reply.status, (*reply.headers, ("Content-Range", f"bytes */{file.size}")), reply.body, reply.error
            )
        if span is None:
            return whole
        offset, length = span
        content_range = ("Content-Range", f"bytes {offset}-{offset + length - 1}/{file.size}")
        return Reply(206, (*headers, content_range), FilePart(file, offset, length))
