"""The streamed model against the larger of two bounds: the transfer alone, and plain transformers from the disk.

Those bounds take it for granted that the other costs nothing. Where receiver, server and torch have to share the cores,
the rows named of_both say what the machine can do at all: the plain side and a transfer of the same bytes at the same
time, two programs that wait for nothing of each other. Where cores are spare, they relax nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert
from bench.worker import Worker, together


class _Case(NamedTuple):
    what: str
    batch: int
    tokens: int
    threads: int

    def row(self, goal: float | None, *, or_else: bool = False) -> Row:
        name = f"client.{self.what}.{self.batch}x{self.tokens}_t{self.threads}"
        return Row(name, unit="s", better="lower", goal=goal, issue=4, or_else=f"{name}.of_both" if or_else else "")

    def rows(self, goal: float) -> tuple[Row, Row]:
        row = self.row(goal, or_else=True)
        return row, Row(row.or_else, unit="s", better="lower", goal=goal, issue=4)

    def worker(self, bert: ServedBert, side: str, what: str = "", env: dict[str, str] | None = None) -> Worker:
        where = bert.address if side == "stream" else bert.folder
        sizes = (str(self.batch), str(self.tokens), str(self.threads))
        return bert.run.closing.enter_context(Worker("client_forward", what or self.what, *sizes, side, where, env=env))

    def beside(self, bert: ServedBert, what: str) -> Worker:
        """The plain side where others need the cores too: threads that wait asleep are the faster ones then."""
        return self.worker(bert, "plain", what, {"OMP_WAIT_POLICY": "passive"})


_FIRST = {
    case: case.rows(goal) for case, goal in ((_Case("first", 1, 128, 1), 1.10), (_Case("first", 8, 128, 2), 1.15))
}
_REPORTED = {
    case: case.row(None) for case in (_Case("first", 1, 128, 2), _Case("first", 1, 16, 2), _Case("cold", 1, 128, 1))
}
_STEADY = {
    case: case.rows(goal) for case, goal in ((_Case("steady3", 1, 128, 1), 1.10), (_Case("steady3", 8, 128, 2), 1.20))
}
_KEPT = _Case("steady", 8, 128, 2)
_KEPT_ROW = _KEPT.row(1.03)
_BYTES = Row("client.bytes_per_pass.cache3", unit="1", better="lower", goal=1.0, issue=4)


@benchmark(*(row for rows in _FIRST.values() for row in rows), *_REPORTED.values())
def first(run: Run) -> dict[str, Pair]:
    """The first pass, BERT-base size, loopback, warm server, each side in a process of its own."""
    bert = ServedBert.serve(run)
    pairs: dict[str, Pair] = {}
    for case, (row, of_both) in _FIRST.items():
        values = _first(bert, case, both=True)
        pairs |= {row.name: _of_larger(values), of_both.name: Pair(values["ours"], values["both"])}
    return pairs | {row.name: _of_larger(_first(bert, case, both=False)) for case, row in _REPORTED.items()}


@benchmark(*(row for rows in _STEADY.values() for row in rows), _KEPT_ROW, _BYTES)
def steady(run: Run) -> dict[str, Pair]:
    """Passes after the first that keep 3 of 12 layers, or all, against plain ones; and how many bytes they receive."""
    bert = ServedBert.serve(run)
    share = _Case("bytes", 1, 128, 1).worker(bert, "stream").measure()
    pairs = {_BYTES.name: Pair((share,), ((12 - 3 + 1) / 12,))}
    received = round(share * bert.weights_mib("encoder.layer.") * 2**20)
    transfer = bert.worker("read_raw_tcp", bert.peer("raw_tcp"), str(received), "1")
    for case, (row, of_both) in _STEADY.items():
        beside = case.beside(bert, case.what)
        values = _passes(bert, case, {"both": lambda beside=beside: together(beside, transfer)})
        pairs |= {
            row.name: Pair(values["ours"], values["plain"]),
            of_both.name: Pair(values["ours"], values["both"]),
        }
    values = _passes(bert, _KEPT, {})
    return pairs | {_KEPT_ROW.name: Pair(values["ours"], values["plain"])}


def _first(bert: ServedBert, case: _Case, *, both: bool) -> dict[str, tuple[float, ...]]:
    transfer = case.worker(bert, "stream", "transfer")
    sides = {
        "ours": case.worker(bert, "stream").measure,
        "plain": case.worker(bert, "plain", "first").measure,
        "transfer": transfer.measure,
    }
    if both:
        beside = case.beside(bert, "first")
        sides["both"] = lambda: together(beside, transfer)
    return interleaved(sides, rounds=bert.run.rounds(9), warmup=2)


def _of_larger(values: dict[str, tuple[float, ...]]) -> Pair:
    bound = tuple(max(pair) for pair in zip(values["plain"], values["transfer"], strict=True))
    return Pair(values["ours"], bound)


def _passes(bert: ServedBert, case: _Case, more: dict[str, Callable[[], float]]) -> dict[str, tuple[float, ...]]:
    sides = {"ours": case.worker(bert, "stream").measure, "plain": case.worker(bert, "plain").measure, **more}
    return interleaved(sides, rounds=bert.run.rounds(31), warmup=2)
