"""What a benchmark is: rows with stable names, and the function that measures them together."""

import contextlib
import fnmatch
import importlib
import pkgutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.measure import Pair


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: stable; what `python -m tests.bench NAME` takes.
        unit: of the measured values.
        better: which direction of the value, and so of the ratio ours / peer, is the good one.
        goal: bound of the ratio that an issue states; None where it only wants the figure reported.
        issue: number in the title of the issue that asks for it.
        or_else: name of another row of the same benchmark whose goal would do instead.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    goal: float | None
    issue: int
    or_else: str = ""

    def meets(self, ratio: float) -> bool:
        """Whether a ratio reaches the goal."""
        return self.goal is None or (ratio <= self.goal if self.better == "lower" else ratio >= self.goal)


class NotMeasurable(Exception):
    """This machine lacks what a benchmark needs; the text says what."""


@dataclass(frozen=True)
class Run:
    """What a benchmark is given: how thorough to be, a folder of its own, and an end at which things are closed."""

    quick: bool
    folder: Path
    closing: contextlib.ExitStack

    def rounds(self, full: int) -> int:
        """How many rounds to measure: `full`, or 3 for a quick look."""
        return min(3, full) if self.quick else full


Measure = Callable[[Run], Mapping[str, Pair]]


@dataclass(frozen=True)
class Benchmark:
    """Rows that one function measures in one go, by row name."""

    rows: tuple[Row, ...]
    measure: Measure

    def run(self, *, quick: bool) -> Mapping[str, Pair]:
        """Measure all of its rows; whatever was started for it is stopped on the way out."""
        with tempfile.TemporaryDirectory(prefix="modelcache-bench-") as folder, contextlib.ExitStack() as closing:
            pairs = self.measure(Run(quick, Path(folder), closing))
        if missing := {row.name for row in self.rows} ^ set(pairs):
            raise ValueError(f"{self.measure.__qualname__} registered other rows than it measured: {sorted(missing)}")
        return pairs

    def otherwise_met(self, row: Row, pairs: Mapping[str, Pair]) -> bool:
        """Whether the row names an alternative, and that one's goal is met."""
        return any(other.name == row.or_else and other.meets(pairs[other.name].ratio) for other in self.rows)


_benchmarks: list[Benchmark] = []


def benchmark(*rows: Row) -> Callable[[Measure], Measure]:
    """Register the decorated function as what measures these rows."""

    def register(measure: Measure) -> Measure:
        taken = {row.name for known in _benchmarks for row in known.rows}
        if twice := taken.intersection(row.name for row in rows):
            raise ValueError(f"two benchmarks are called {sorted(twice)}")
        _benchmarks.append(Benchmark(rows, measure))
        return measure

    return register


def load() -> list[Benchmark]:
    """Import every module of bench/rows; all benchmarks, in the order of module names."""
    package = importlib.import_module("bench.rows")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        importlib.import_module(f"bench.rows.{module.name}")
    return list(_benchmarks)


def select(benchmarks: Iterable[Benchmark], patterns: Iterable[str]) -> Iterator[tuple[Benchmark, tuple[Row, ...]]]:
    """The rows whose name is, starts with (up to a dot) or matches a pattern, and their benchmarks; without any, all.

    Raises:
        LookupError: a pattern that fits no row.
    """
    benchmarks, patterns = list(benchmarks), list(patterns)
    names = [row.name for known in benchmarks for row in known.rows]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise LookupError(f"no row is called {pattern!r}; there are: {', '.join(names)}")
    for known in benchmarks:
        rows = tuple(row for row in known.rows if not patterns or any(_fits(row.name, pattern) for pattern in patterns))
        if rows:
            yield known, rows


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)
