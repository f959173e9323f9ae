"""When to try again: limits, exponential backoff with jitter, Retry-After. Pure but for the random number."""

import email.utils
import math
import random
import time
from dataclasses import dataclass

MAX_RETRY_AFTER = 3600.0
"""Seconds; a server that asks for more is taken at its word only so far."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a fetch tries.

    Attributes:
        attempts: Requests in a row for one range that may fail without bringing a byte.
        plan_attempts: Listings in a row that may fail.
        backoff: Seconds to wait after the first failure; doubles up to ``backoff_cap``, with jitter.
        backoff_cap: Seconds.
        connect_timeout: Seconds to connect, TLS included.
        read_timeout: Seconds without a byte after which a connection is given up and the range continued on another.
        stall_timeout: Seconds without a byte for one range, over all its connections, after which the fetch is Stalled.
        rate_limit_wait: Seconds altogether that a fetch waits because of 429, before it is RateLimited.
        deadline_seconds: Seconds for the whole fetch; None: no limit.
        api_timeout: Seconds without an answer after which a listing fails.
    """

    attempts: int = 8
    plan_attempts: int = 4
    backoff: float = 0.5
    backoff_cap: float = 30.0
    connect_timeout: float = 15.0
    read_timeout: float = 60.0
    stall_timeout: float = 300.0
    rate_limit_wait: float = 1800.0
    deadline_seconds: float | None = None
    api_timeout: float = 30.0


def backoff_seconds(limits: Limits, failures: int) -> float:
    """Seconds to wait after ``failures`` (1 or more) failures in a row: half fixed, half random ("equal jitter").

    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """
    full: float = min(limits.backoff_cap, limits.backoff * 2.0 ** min(failures - 1, 30))
    return full / 2 + full / 2 * random.random()  # noqa: S311 - spreads load, protects nothing


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3: seconds or a date); None if absent or unreadable."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        if parsed is None:
            return None
        seconds = email.utils.mktime_tz(parsed) - (time.time() if now is None else now)
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
