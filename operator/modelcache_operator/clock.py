"""RFC 3339 times as Kubernetes writes them, to the second."""

import datetime as dt


def format_time(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC."""
    return dt.datetime.fromtimestamp(int(seconds), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> float:
    """Seconds since the epoch; 0 for no time."""
    return dt.datetime.fromisoformat(text).timestamp() if text else 0.0
