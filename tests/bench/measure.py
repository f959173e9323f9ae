"""How values are taken and summed up: interleaved rounds, medians, one ratio."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """The values of both sides, in the row's unit, one of each for every round."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    def __post_init__(self):
        if not self.ours or len(self.ours) != len(self.peer):
            raise ValueError(f"{len(self.ours)} values of ours and {len(self.peer)} of the peer make no pairs")

    @property
    def runs(self) -> int:
        """How many rounds were measured."""
        return len(self.ours)

    @property
    def ours_median(self) -> float:
        """Our value."""
        return statistics.median(self.ours)

    @property
    def peer_median(self) -> float:
        """The peer's value."""
        return statistics.median(self.peer)

    @property
    def ratio(self) -> float:
        """Ours / peer, of the medians."""
        return self.ours_median / self.peer_median


def interleaved(
    variants: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, tuple[float, ...]]:
    """Measure A B C, A B C, … so that whatever else the machine does meets all of them alike.

    Args:
        variants: by name, what does the work once and returns its value.
        rounds: how many values of each are kept.
        warmup: how many rounds before them are thrown away.

    Returns:
        The values of each variant, round by round.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, measure in variants.items():
            value = measure()
            if number >= warmup:
                values[name].append(value)
    return {name: tuple(taken) for name, taken in values.items()}
