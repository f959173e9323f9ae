"""HTTP/1.1 requests and ranges as pure functions: strict, bounded, and never guessing (RFC 9110, RFC 9112)."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from modelcache_server.errors import Reason, RequestError

MAX_HEADERS = 64
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_NAME}) ([\x21-\x7e]+) HTTP/1\.([01])")
_OTHER_VERSION = re.compile(rf"{_NAME} [\x21-\x7e]+ HTTP/[0-9]\.[0-9]")
_HEADER_NAME = re.compile(_NAME)
_FORBIDDEN = bytes({*range(0x20), 0x7F} - set(b"\t\r\n"))
_SINGULAR = frozenset({"host", "content-length", "range", "authorization", "if-range", "transfer-encoding"})
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
_RANGE = re.compile(r"bytes=(?:([0-9]+)-([0-9]*)|-([0-9]+))", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]+")
_BEYOND = 10**19  # more bytes than any file has
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class BadRequest(Exception):
    """A request that breaks the rules of HTTP: it is answered with `status`, and its connection is closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyWanted(Exception):
    """A request cannot be answered before its body is here."""


@dataclass(frozen=True)
class Request:
    """A request, as soon as its head is here.

    Attributes:
        method: as sent; methods are case-sensitive.
        path: the target's path, still percent-encoded.
        query: what follows "?"; empty without one.
        headers: values by lowercase name; several of one name are joined with ", ".
        keep_alive: whether the client wants the connection kept.
        body_length: bytes that follow the head; None if that is not known beforehand.
        body: those bytes; None while they were not read.
    """

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    keep_alive: bool = True
    body_length: int | None = 0
    body: bytes | None = b""

    def content(self, limit: int) -> bytes:
        """The body, of at most `limit` bytes.

        Raises:
            BodyWanted: it was not read yet; ask again when it was.
            BadRequest: 411 without a length, 413 beyond the limit.
        """
        if self.body is not None:
            return self.body
        if self.body_length is None:
            raise BadRequest(411, "The body needs a Content-Length.")
        if self.body_length > limit:
            raise BadRequest(413, f"The body is longer than {limit} bytes: ask for less at once.")
        raise BodyWanted

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
        BadRequest: 400 for malformed heads and for bodies where none belongs, 417 for an unknown expectation, 431 for
            too many headers, 505 for other versions.
    """
    line, *rest = head.decode("latin-1").split("\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if _OTHER_VERSION.fullmatch(line):
            raise BadRequest(505, "This server speaks HTTP/1.1.")
        raise BadRequest(400, "The request line is malformed.")
    method, target, minor = match.groups()
    if (absolute := _ABSOLUTE.match(target)) is not None:
        target = target[absolute.end() :]
        target = target if target.startswith("/") else "/" + target
    if not target.startswith("/"):
        raise BadRequest(400, "The request's target must be a path.")
    if len(rest) > MAX_HEADERS:
        raise BadRequest(431, f"More than {MAX_HEADERS} headers.")
    headers = _parse_headers(head, rest)
    if minor == "0":
        headers.pop("expect", None)  # from clients that cannot wait for the answer to it
    elif "host" not in headers:
        raise BadRequest(400, "The Host header is missing.")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise BadRequest(417, "This server knows the expectation 100-continue only.")
    body_length = _body_length(headers)
    if body_length != 0 and method in {"GET", "HEAD"}:
        raise BadRequest(400, "Requests that read have no body.")
    wishes = {wish.strip().lower() for wish in headers.get("connection", "").split(",")}
    keep_alive = "close" not in wishes and (minor == "1" or "keep-alive" in wishes)
    path, _, query = target.partition("?")
    body = b"" if body_length == 0 else None
    return Request(method, path, query, headers, keep_alive, body_length, body)


def _body_length(headers: dict[str, str]) -> int | None:
    if "transfer-encoding" in headers:
        return None
    stated = headers.get("content-length", "0")
    if not _LENGTH.fullmatch(stated):
        raise BadRequest(400, "The Content-Length is no number.")
    return _number(stated)


def _number(digits: str) -> int:
    """However many digits there are."""
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) < len(str(_BEYOND)) else _BEYOND


def _parse_headers(head: bytes, lines: list[str]) -> dict[str, str]:
    # Each line break is one CR and one LF, and no control character but the tab is part of a header.
    breaks = len(lines)
    if head.translate(None, _FORBIDDEN) != head or head.count(b"\r") != breaks or head.count(b"\n") != breaks:
        raise BadRequest(400, "A header is malformed.")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or _HEADER_NAME.fullmatch(name) is None:
            raise BadRequest(400, "A header is malformed.")
        name = name.lower()
        value = value.strip(" \t")
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
    if value is None or not value.lower().startswith("bytes="):
        return None
    match = _RANGE.fullmatch(value)
    if match is None:
        raise RequestError(Reason.INVALID_REQUEST, "Range must be one range of bytes, like bytes=0-1023.")
    first, last, suffix = match.groups()
    if suffix is not None:
        length = min(_number(suffix), size)
        start, end = size - length, size
    else:
        start = _number(first)
        if last and _number(last) < start:
            raise RequestError(Reason.INVALID_REQUEST, "The range ends before it begins.")
        end = min(size, _number(last) + 1) if last else size
    if start >= end:
        raise RequestError(Reason.OUT_OF_RANGE, f"The range is outside the file's {size} bytes.")
    return start, end - start


def matches_etag(value: str, etag: str, *, weak: bool) -> bool:
    """Whether an If-Match or If-None-Match header names this (strong, unquoted) entity tag, or any.

    Args:
        value: the header.
        etag: what there is.
        weak: whether a weak tag of the same name will do.
    """
    tags = {tag.strip() for tag in value.split(",")}
    return value == "*" or f'"{etag}"' in tags or (weak and f'W/"{etag}"' in tags)
