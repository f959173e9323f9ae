"""Kubernetes quantities ("20Gi", "500m") and Go durations ("1h30m"), parsed exactly as the API server does.

Sources: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/ and
https://pkg.go.dev/time#ParseDuration.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

_BINARY = {suffix: 1024**power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)}
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_QUANTITY = re.compile(
    r"([+-]?)([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:([eE][+-]?[0-9]{1,2})|([KMGTPE]i|[numkMGTPE]?))"
)
_DURATION = re.compile(
    r"(?:(?P<h>[0-9]{1,9}(?:\.[0-9]{1,9})?)h)?(?:(?P<m>[0-9]{1,9}(?:\.[0-9]{1,9})?)m)?"
    r"(?:(?P<s>[0-9]{1,9}(?:\.[0-9]{1,9})?)s)?(?:(?P<ms>[0-9]{1,9})ms)?"
)


@lru_cache(maxsize=1024)
def parse_quantity(text: str) -> Fraction:
    """The exact value of a Kubernetes quantity.

    Args:
        text: Such as "20Gi", "1.5G", "500m" or "1e9".

    Raises:
        ValueError: The text is no quantity; the message says what one looks like.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no quantity; write a number with a unit, such as 20Gi, 500Mi or 1500m")
    sign, number, exponent, suffix = found.groups()
    if exponent:
        scale = Fraction(10) ** int(exponent[1:])
    elif suffix in _BINARY:
        scale = Fraction(_BINARY[suffix])
    else:
        scale = Fraction(10) ** _DECIMAL[suffix]
    value = Fraction(number) * scale
    return -value if sign == "-" else value


def parse_bytes(text: str) -> int:
    """A quantity in whole bytes, rounded up, as storage and memory are.

    Raises:
        ValueError: The text is no quantity, or not positive.
    """
    value = parse_quantity(text)
    if value <= 0:
        raise ValueError(f"{text!r} must be more than 0, such as 20Gi")
    return math.ceil(value)


def format_bytes(count: int) -> str:
    """A byte count as people read it: "86.7 MiB"."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 5)
    return f"{count / 1024**power:.1f} {'KMGTP'[power - 1]}iB"


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as "10m", "1h30m", "90s" or "500ms".

    Raises:
        ValueError: The text is no duration; the message says what one looks like.
    """
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        raise ValueError(f"{text!r} is no duration; write hours, minutes and seconds such as 10m, 1h30m or 90s")
    hours, minutes, seconds, milliseconds = (float(found[unit] or 0) for unit in ("h", "m", "s", "ms"))
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
