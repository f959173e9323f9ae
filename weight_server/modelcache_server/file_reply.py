"""The answer to a request for a file, the same under every URL: ranges and conditions (RFC 9110). Pure."""

from modelcache_server.errors import Reason, RequestError
from modelcache_server.http_connection import FilePart, Reply, error_reply, without_body
from modelcache_server.http_message import Request, matches_etag, parse_range
from modelcache_server.store import ServedFile

Headers = tuple[tuple[str, str], ...]


def file_reply(request: Request, file: ServedFile, etag: str, more: Headers, wanted: str | None) -> Reply:
    """Answer GET or HEAD of a file.

    Args:
        request: its conditions are honoured.
        file: what is asked for.
        etag: the file's entity tag, without quotes.
        more: headers besides those that every file has.
        wanted: the Range header that counts; None for the whole file.

    Raises:
        RequestError: INVALID_REQUEST for a range without sense; PRECONDITION_FAILED if If-Match means another file.
    """
    headers = (
        ("Content-Type", "application/octet-stream"),
        ("Accept-Ranges", "bytes"),
        ("ETag", f'"{etag}"'),
        *more,
    )
    whole = Reply(200, headers, FilePart(file, 0, file.size))
    meant = request.headers.get("if-match")
    if meant is not None and not matches_etag(meant, etag, weak=False):
        raise RequestError(Reason.PRECONDITION_FAILED, f'The file is another one by now: its ETag is "{etag}".')
    known = request.headers.get("if-none-match")
    if known is not None and matches_etag(known, etag, weak=True):
        return without_body(whole, 304)
    # HEAD has no ranges. If-Range has no "*", no list, and no date here, where no file has one.
    if request.method != "GET" or request.headers.get("if-range", f'"{etag}"') != f'"{etag}"':
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
        content_range = ("Content-Range", f"bytes */{file.size}")
        return Reply(reply.status, (*reply.headers, *more, content_range), reply.body, reply.error)
    if span is None:
        return whole
    offset, length = span
    content_range = ("Content-Range", f"bytes {offset}-{offset + length - 1}/{file.size}")
    return Reply(206, (*headers, content_range), FilePart(file, offset, length))
