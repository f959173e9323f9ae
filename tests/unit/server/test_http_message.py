import pytest

from modelcache_server.errors import Reason, RequestError
from modelcache_server.http_message import BadRequest, BodyWanted, Request, matches_etag, parse_range, parse_request


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1")


def test_a_request_is_understood():
    request = parse_request(head("GET /v1/a%20b?x=1 HTTP/1.1", "Host: here", "RANGE:  bytes=0-1 ", "X: 1", "x: 2"))
    assert (request.method, request.path, request.query) == ("GET", "/v1/a%20b", "x=1")
    assert request.headers == {"host": "here", "range": "bytes=0-1", "x": "1, 2"}
    assert request.keep_alive
    assert request.segments() == ["v1", "a b"]


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("http://other:80/a//b?x=http://y", "/a//b", "x=http://y"),
        ("HTTPS://other/a", "/a", ""),
        ("http://[::1]:8080", "/", ""),
        ("http://other?x=1", "/", "x=1"),
        ("//acme/tiny", "//acme/tiny", ""),
    ],
)
def test_a_target_may_be_a_whole_url(target, path, query):
    request = parse_request(head(f"GET {target} HTTP/1.1", "Host: here"))
    assert (request.path, request.query) == (path, query)


def test_a_body_is_wanted_before_it_is_read():
    request = parse_request(head("POST / HTTP/1.1", "Host: h", "Content-Length: 005"))
    assert (request.body, request.body_length) == (None, 5)
    with pytest.raises(BodyWanted):
        request.content(5)
    with pytest.raises(BadRequest, match="longer than 4 bytes") as caught:
        request.content(4)
    assert caught.value.status == 413
    assert Request("POST", "/", body=b"12345").content(5) == b"12345"


@pytest.mark.parametrize(
    ("line", "status"),
    [("Transfer-Encoding: chunked", 411), ("Content-Length: 65537", 413), (f"Content-Length: {'9' * 5000}", 413)],
)
def test_a_body_without_bounds_is_not_read(line, status):
    request = parse_request(head("POST / HTTP/1.1", "Host: h", line))
    with pytest.raises(BadRequest) as caught:
        request.content(65536)
    assert caught.value.status == status


@pytest.mark.parametrize(("version", "expected"), [("1.1", "100-Continue"), ("1.0", None)])
def test_only_who_can_wait_expects_an_answer_to_its_head(version, expected):
    request = parse_request(head(f"POST / HTTP/{version}", "Host: h", "Content-Length: 5", "Expect: 100-Continue"))
    assert request.headers.get("expect") == expected


@pytest.mark.parametrize(
    ("line", "connection", "kept"),
    [
        ("GET / HTTP/1.1", "", True),
        ("GET / HTTP/1.1", "Close", False),
        ("GET / HTTP/1.1", "x, close", False),
        ("GET / HTTP/1.0", "", False),
        ("GET / HTTP/1.0", "Keep-Alive", True),
    ],
)
def test_connections_are_kept_as_the_client_wants(line, connection, kept):
    assert parse_request(head(line, "Host: h", f"Connection: {connection}")).keep_alive is kept


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([""], 400),
        (["GET /"], 400),
        (["GET  / HTTP/1.1", "Host: h"], 400),
        (["GET /a b HTTP/1.1", "Host: h"], 400),
        (["GET http:///a HTTP/1.1", "Host: h"], 400),
        (["GET ftp://other/ HTTP/1.1", "Host: h"], 400),
        (["GET http://other/ HTTP/1.1"], 400),
        (["GET * HTTP/1.1", "Host: h"], 400),
        (["G@T / HTTP/1.1", "Host: h"], 400),
        (["GET /\x00 HTTP/1.1", "Host: h"], 400),
        (["GET /\xe9 HTTP/1.1", "Host: h"], 400),
        (["GET / HTTP/2.0", "Host: h"], 505),
        (["GET / HTTP/1.1"], 400),
        (["GET / HTTP/1.1", "Host : h"], 400),
        (["GET / HTTP/1.1", "Host: h", " folded"], 400),
        (["GET / HTTP/1.1", "Host: h", "no colon"], 400),
        (["GET / HTTP/1.1", "Host: h", "X: a\nY: b"], 400),
        (["GET / HTTP/1.1", "Host: h", "X: a\rb"], 400),
        (["GET / HTTP/1.1", "Host: h", "Host: g"], 400),
        (["GET / HTTP/1.1", "Host: h", "Range: bytes=0-1", "Range: bytes=2-3"], 400),
        (["GET / HTTP/1.1", "Host: h", "Content-Length: 5"], 400),
        (["GET / HTTP/1.1", "Host: h", "Content-Length: 0", "Content-Length: 5"], 400),
        (["GET / HTTP/1.1", "Host: h", "Transfer-Encoding: chunked"], 400),
        (["POST / HTTP/1.1", "Host: h", "Content-Length: -1"], 400),
        (["POST / HTTP/1.1", "Host: h", "Content-Length: 5, 5"], 400),
        (["POST / HTTP/1.1", "Host: h", "Content-Length: 5", "Expect: x"], 417),
        (["GET / HTTP/1.1", *["X: y"] * 65], 431),
    ],
)
def test_what_breaks_the_rules_is_refused(lines, status):
    with pytest.raises(BadRequest) as caught:
        parse_request(head(*lines))
    assert caught.value.status == status


@pytest.mark.parametrize("path", ["/%", "/%4", "/%zz", "/%ff", "/%00", "/a%0Ab", "/%7f"])
def test_a_path_that_cannot_be_a_file_is_refused(path):
    with pytest.raises(RequestError) as caught:
        parse_request(head(f"GET {path} HTTP/1.1", "Host: h")).segments()
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    ("value", "span"),
    [
        (None, None),
        ("lines=1-2", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=5-", (5, 95)),
        ("bytes=99-", (99, 1)),
        ("bytes=-1", (99, 1)),
        ("bytes=-1000", (0, 100)),
        ("bytes=10-9999999999999999999", (10, 90)),
        (f"bytes=10-{'9' * 5000}", (10, 90)),
        (f"bytes=-{'9' * 20}", (0, 100)),
        (f"bytes={'0' * 30}5-{'0' * 5000}7", (5, 3)),
        ("Bytes=0-0", (0, 1)),
    ],
)
def test_a_range_is_cut_at_the_end_of_the_file(value, span):
    assert parse_range(value, 100) == span


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("bytes=100-", Reason.OUT_OF_RANGE),
        ("bytes=100-200", Reason.OUT_OF_RANGE),
        ("bytes=9999999999999999999-", Reason.OUT_OF_RANGE),
        ("bytes=-0", Reason.OUT_OF_RANGE),
        ("bytes=", Reason.INVALID_REQUEST),
        ("bytes=-", Reason.INVALID_REQUEST),
        ("bytes=2-1", Reason.INVALID_REQUEST),
        ("bytes=0-1,3-4", Reason.INVALID_REQUEST),
        ("bytes=0-1,", Reason.INVALID_REQUEST),
        ("bytes=a-b", Reason.INVALID_REQUEST),
        ("bytes=--1", Reason.INVALID_REQUEST),
        ("bytes=+1-2", Reason.INVALID_REQUEST),
        ("bytes=1 - 2", Reason.INVALID_REQUEST),
        ("bytes=\u0661-\u0662", Reason.INVALID_REQUEST),
        (f"bytes={'9' * 20}-", Reason.OUT_OF_RANGE),
        (f"bytes={'9' * 5000}-{'9' * 5000}", Reason.OUT_OF_RANGE),
        (f"bytes={'9' * 5000}-5", Reason.INVALID_REQUEST),
    ],
)
def test_a_range_outside_the_file_or_without_sense_is_refused(value, reason):
    with pytest.raises(RequestError) as caught:
        parse_range(value, 100)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("value", "strong", "weak"),
    [
        ('"abc"', True, True),
        ('W/"x", "abc"', True, True),
        ('W/"abc"', False, True),
        ("*", True, True),
        ('"abcd"', False, False),
        ("abc", False, False),
    ],
)
def test_entity_tags_are_compared_one_by_one(value, strong, weak):
    assert matches_etag(value, "abc", weak=False) is strong
    assert matches_etag(value, "abc", weak=True) is weak
