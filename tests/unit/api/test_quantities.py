"""Quantities and durations mean what Kubernetes and Go say."""

from fractions import Fraction

import pytest

from modelcache_api.quantities import format_bytes, parse_bytes, parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20Gi", 20 * 2**30), ("1.5G", 1_500_000_000), ("500m", Fraction(1, 2)), ("0.5Ki", 512), ("1e3", 1000),
        ("1E", 10**18), ("1Ei", 2**60), ("-1", -1), ("+2k", 2000), ("100n", Fraction(1, 10**7)), (".5", Fraction(1, 2)),
        ("5.", 5), ("12E2", 1200),
    ],
)  # fmt: skip
def test_quantities(text, value):
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "Gi", "1 Gi", "1gi", "1KB", "1O", "0x10", "1e", "--1", "1e100", "9" * 31, "\uff11Gi", "1Gi\n"]
)
def test_no_quantities(text):
    with pytest.raises(ValueError, match="is no quantity"):
        parse_quantity(text)


def test_bytes_are_rounded_up_and_positive():
    assert parse_bytes("1500m") == 2
    with pytest.raises(ValueError, match="more than 0"):
        parse_bytes("0")


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("1h30m", 5400), ("90s", 90), ("500ms", 0.5), ("1.5h", 5400), ("0s", 0)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "1m1h", "-1m", "1d", "1 m", "1M"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (90_868_376, "86.7 MiB"), (2**50, "1.0 PiB")]
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
