"""HTTP/1.1 requests and ranges as pure functions: strict, bounded, and never guessing (RFC 9110, RFC 9112)."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from modelcache_server.errors import Reason, RequestError

MAX_HEADERS = 64
MAX_BODY_BYTES = 64 * 1024
_ASKED_BY_POST = b"/paths-info/"  # every other POST would write
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\x20-\x7e\x80-\xff\t]*?)[ \t]*")
_SINGULAR = frozenset({"host", "content-length", "range", "authorization", "if-range", "transfer-encoding"})
_RANGE = re.compile(r"bytes=(?:([0-9]{1,19})-([0-9]{0,19})|-([0-9]{1,19}))")
_LENGTH = re.compile(r"[0-9]{1,19}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class BadRequest(Exception):
    """A request that breaks the rules of HTTP: it is answered with `status`, and its connection is closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A request; only a POST has a body.

    Attributes:
        method: as sent; methods are case-sensitive.
        path: the target's path, still percent-encoded.
        query: what follows "?"; empty without one.
        headers: values by lowercase name; several of one name are joined with ", ".
        keep_alive: whether the client wants the connection kept.
        body_length: bytes that follow the head.
        body: those bytes, once they were read.
    """

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    keep_alive: bool = True
    body_length: int = 0
    body: bytes = b""

    def segments(self) -> list[str]:
        """The path's decoded components; a slash that was escaped stays inside its component.

        Raises:
            RequestError: INVALID_REQUEST for a bad escape, bytes that are no UTF-8, or control characters.
        """
        if "%" not in self.path:  # only an escape can hide what a target must not have
            return self.path.split("/")[1:]
        if _BAD_ESCAPE.search(self.path):
            raise RequestError(Reason.INVALID_REQUEST, "The path has a % that is no escape.")
        decoded = []
        for segment in self.path.split("/")[1:]:
            try:
                text = unquote_to_bytes(segment).decode() if "%" in segment else segment
            except UnicodeDecodeError:
                raise RequestError(Reason.INVALID_REQUEST, "The path is not UTF-8.") from None
            if _CONTROL.search(text):
                raise RequestError(Reason.INVALID_REQUEST, "The path has control characters.")
            decoded.append(text)
        return decoded


def parse_request(head: bytes) -> Request:
    r"""Parse a request's head, up to but without the empty line that ends it.

    Args:
        head: the bytes before `\r\n\r\n`.

    Raises:
        BadRequest: 400 for malformed heads and for bodies where none belongs, 405 for uploads, 413 for a body above
            `MAX_BODY_BYTES`, 431 for too many headers, 505 for other versions.
    """
    line, *rest = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if re.fullmatch(_TOKEN + rb" [\x21-\x7e]+ HTTP/\d\.\d", line):
            raise BadRequest(505, "This server speaks HTTP/1.1.")
        raise BadRequest(400, "The request line is malformed.")
    method, target, minor = match.groups()
    if not target.startswith(b"/"):
        raise BadRequest(400, "The request's target must be a path.")
    if len(rest) > MAX_HEADERS:
        raise BadRequest(431, f"More than {MAX_HEADERS} headers.")
    headers = _parse_headers(rest)
    if minor == b"1" and "host" not in headers:
        raise BadRequest(400, "The Host header is missing.")
    body_length = _body_length(method, target, headers)
    wishes = {wish.strip().lower() for wish in headers.get("connection", "").split(",")}
    keep_alive = "close" not in wishes and (minor == b"1" or "keep-alive" in wishes)
    path, _, query = target.decode("ascii").partition("?")
    return Request(method.decode("ascii"), path, query, headers, keep_alive, body_length)


def _body_length(method: bytes, target: bytes, headers: dict[str, str]) -> int:
    """A body that we would not read could be taken for the next request: what is not read ends the connection."""
    stated = headers.get("content-length", "0")
    known = "transfer-encoding" not in headers and _LENGTH.fullmatch(stated)
    length = int(stated) if known else None
    if length != 0 and method not in {b"GET", b"HEAD", b"POST"}:
        raise BadRequest(405, "This server is read-only.")
    if (length is None or length > MAX_BODY_BYTES) and method == b"POST" and _ASKED_BY_POST not in target:
        raise BadRequest(405, "This server is read-only.")
    if length is None:
        raise BadRequest(400, "A request's body needs a Content-Length.")
    if length and method != b"POST":
        raise BadRequest(400, "Requests that read have no body.")
    if length > MAX_BODY_BYTES:
        raise BadRequest(413, f"The body is longer than {MAX_BODY_BYTES} bytes.")
    return length


def _parse_headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest(400, "A header is malformed.")
        name = match[1].decode("ascii").lower()
        value = match[2].decode("latin-1")
        if name in headers:
            if name in _SINGULAR:
                raise BadRequest(400, f"The header {name} occurs twice.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def parse_range(value: str | None, size: int) -> tuple[int, int] | None:
    """The bytes that a Range header asks for.

    Args:
        value: the header; None without one. Units other than bytes are ignored, as RFC 9110 says.
        size: of the file in bytes.

    Returns:
        (offset, length) of a single range, cut at the file's end; None for the whole file.

    Raises:
        RequestError: OUT_OF_RANGE when no byte of it is in the file; INVALID_REQUEST for several ranges or nonsense.
    """
    if value is None or not value.startswith("bytes="):
        return None
    match = _RANGE.fullmatch(value)
    if match is None:
        raise RequestError(Reason.INVALID_REQUEST, "Range must be one range of bytes, like bytes=0-1023.")
    first, last, suffix = match.groups()
    if suffix is not None:
        length = min(int(suffix), size)
        start, end = size - length, size
    else:
        start = int(first)
        if last and int(last) < start:
            raise RequestError(Reason.INVALID_REQUEST, "The range ends before it begins.")
        end = min(size, int(last) + 1) if last else size
    if start >= end:
        raise RequestError(Reason.OUT_OF_RANGE, f"The range is outside the file's {size} bytes.")
    return start, end - start


def matches_etag(value: str, etag: str) -> bool:
    """Whether an If-None-Match or If-Range list names this (strong, unquoted) entity tag."""
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in value.split(",")}
    return etag in tags or "*" in tags
