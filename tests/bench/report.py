"""The table that people read and the JSON that programs read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Pair
from bench.registry import Row

COLUMNS = (
    f"{'name':<36} {'ours':>10} {'peer':>10} {'unit':<5} {'ratio':>6} {'goal':>7}  {'':<5} runs  spread of ours, peer"
)


@dataclass(frozen=True)
class Result:
    """A measured row."""

    row: Row
    pair: Pair
    otherwise_met: bool = False
    """The goal of the row that would do instead is met."""

    @property
    def unmet(self) -> bool:
        """Whether a goal is missed, its alternative too."""
        return not self.row.meets(self.pair.ratio) and not self.otherwise_met

    def line(self) -> str:
        """Its line of the table."""
        row, pair = self.row, self.pair
        if row.goal is None:
            goal, verdict = "-", ""
        else:
            goal = f"{'<=' if row.better == 'lower' else '>='} {row.goal:g}"
            verdict = "met" if row.meets(pair.ratio) else "(met)" if self.otherwise_met else "UNMET"
        spread = f"{_range(pair.ours)}, {_range(pair.peer)}"
        return (
            f"{row.name:<36} {_figure(pair.ours_median):>10} {_figure(pair.peer_median):>10} {row.unit:<5}"
            f" {pair.ratio:>6.2f} {goal:>7}  {verdict:<5} {pair.runs:>4}  {spread}"
        )

    def entry(self) -> dict[str, object]:
        """Its entry in bench.json."""
        alternative = {"orElse": self.row.or_else} if self.row.or_else else {}
        return {
            "name": self.row.name,
            "ours": self.pair.ours_median,
            "peer": self.pair.peer_median,
            "ratio": self.pair.ratio,
            "goal": self.row.goal,
            "unit": self.row.unit,
            "better": self.row.better,
            "runs": self.pair.runs,
            "issue": self.row.issue,
            **alternative,
        }


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write the list of entries, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps([result.entry() for result in results], indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _range(values: Sequence[float]) -> str:
    return f"{_figure(min(values))}..{_figure(max(values))}"
