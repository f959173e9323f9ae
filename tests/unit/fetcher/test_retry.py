import pytest

from modelcache_fetcher.retry import MAX_RETRY_AFTER, Limits, backoff_seconds, parse_retry_after


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("-5", 0),
        ("1.5", 1.5),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10),
        ("Sun, 06 Nov 1994 08:49:27 GMT", 0),
        ("999999999", MAX_RETRY_AFTER),
        ("inf", MAX_RETRY_AFTER),
        ("soon", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert parse_retry_after(header, now=784111777) == seconds


def test_backoff_doubles_up_to_its_cap_with_jitter():
    limits = Limits(backoff=1, backoff_cap=10)
    for failures, full in [(1, 1), (2, 2), (3, 4), (10, 10), (10_000, 10)]:
        waits = [backoff_seconds(limits, failures) for _ in range(50)]
        assert all(full / 2 <= wait <= full for wait in waits)
        assert len(set(waits)) > 1
