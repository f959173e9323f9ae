"""The bench interleaves, sums up with medians, and says in table, JSON and exit code what it found."""

import json
import sys
from pathlib import Path

import pytest

from bench import cli, registry
from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, benchmark
from support.processes import TESTS, Child

FASTER = Row("x.time", unit="s", better="lower", goal=1.3, issue=1)
MORE = Row("x.rate", unit="GB/s", better="higher", goal=0.85, issue=1)
SHOWN = Row("y.shown", unit="GB/s", better="higher", goal=None, issue=1)


@pytest.fixture
def rows(monkeypatch):
    """An empty registry; what tests register is what runs."""
    monkeypatch.setattr(registry, "_benchmarks", [])
    monkeypatch.setattr(registry, "load", lambda: list(registry._benchmarks))


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    path = tmp_path / "build" / "bench.json"
    code = cli.main(list(arguments), path)
    return code, json.loads(path.read_text())


def test_variants_alternate_and_warmup_rounds_are_not_kept():
    calls = []

    def variant(name: str):
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    values = interleaved({"a": variant("a"), "b": variant("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert values == {"a": (3.0, 5.0), "b": (4.0, 6.0)}


def test_the_ratio_is_of_medians_so_one_disturbed_round_does_not_count():
    pair = Pair(ours=(1.0, 90.0, 1.0), peer=(2.0, 2.0, 0.1))
    assert (pair.ours_median, pair.peer_median, pair.ratio, pair.runs) == (1.0, 2.0, 0.5, 3)


@pytest.mark.parametrize(("ours", "peer"), [((), ()), ((1.0,), (1.0, 2.0))])
def test_values_without_their_pair_are_refused(ours, peer):
    with pytest.raises(ValueError, match="make no pairs"):
        Pair(ours, peer)


@pytest.mark.parametrize(("row", "met", "unmet"), [(FASTER, 1.3, 1.31), (MORE, 0.85, 0.84)])
def test_a_goal_is_a_bound_in_the_better_direction(row, met, unmet):
    assert row.meets(met)
    assert not row.meets(unmet)
    assert SHOWN.meets(0.0)


def test_table_and_json_tell_the_same_and_an_unmet_goal_is_no_error(rows, tmp_path, capsys):
    @benchmark(FASTER, SHOWN)
    def measure(run):
        return {"x.time": Pair((4.0,), (2.0,)), "y.shown": Pair((3.0, 3.0), (1.0, 2.0))}

    code, entries = run(tmp_path)
    assert code == 0
    common = {"ratio": 2.0, "issue": 1}
    time = {"name": "x.time", "ours": 4.0, "peer": 2.0, "goal": 1.3, "unit": "s", "better": "lower", "runs": 1}
    shown = {"name": "y.shown", "ours": 3.0, "peer": 1.5, "goal": None, "unit": "GB/s", "better": "higher", "runs": 2}
    assert entries == [time | common, shown | common]
    table = capsys.readouterr().out
    assert "<= 1.3  UNMET" in table
    assert "y.shown" in table


@pytest.mark.parametrize(("rate", "time", "verdicts"), [(0.9, 2.0, ("met", "(met)")), (0.8, 2.0, ("UNMET", "UNMET"))])
def test_of_two_goals_one_is_enough_where_the_issue_says_so(rows, tmp_path, capsys, rate, time, verdicts):
    one = Row("z.rate", unit="GB/s", better="higher", goal=0.85, issue=1, or_else="z.time")
    other = Row("z.time", unit="s", better="lower", goal=1.3, issue=1, or_else="z.rate")

    @benchmark(one, other)
    def measure(run):
        return {"z.rate": Pair((rate,), (1.0,)), "z.time": Pair((time,), (1.0,))}

    _, entries = run(tmp_path)
    assert [entry["orElse"] for entry in entries] == ["z.time", "z.rate"]
    printed = capsys.readouterr()
    shown = [line.split() for line in printed.out.splitlines()[1:]]
    assert all(verdict in line for verdict, line in zip(verdicts, shown, strict=True))
    assert f"{verdicts.count('UNMET')} unmet" in printed.err


def test_a_row_that_cannot_be_measured_here_says_why_and_is_no_error(rows, tmp_path, capsys):
    @benchmark(FASTER)
    def impossible(run):
        raise NotMeasurable("needs root")

    assert run(tmp_path) == (0, [])
    assert "not measured: needs root" in capsys.readouterr().out


def test_a_row_that_fails_is_an_error_and_the_others_still_run(rows, tmp_path, capsys):
    @benchmark(FASTER)
    def broken(run):
        raise OSError("no server")

    @benchmark(MORE)
    def works(run):
        return {"x.rate": Pair((1.0,), (1.0,))}

    code, entries = run(tmp_path)
    assert code == 1
    assert [entry["name"] for entry in entries] == ["x.rate"]
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "no server" in printed.err


def test_names_choose_rows_and_an_unknown_one_is_refused(rows, tmp_path, capsys):
    @benchmark(FASTER, MORE)
    def both(run):
        return {row.name: Pair((1.0,), (1.0,)) for row in (FASTER, MORE)}

    @benchmark(SHOWN)
    def unwanted(run):
        raise AssertionError

    assert [entry["name"] for entry in run(tmp_path, "x")[1]] == ["x.time", "x.rate"]
    assert [entry["name"] for entry in run(tmp_path, "*.rate")[1]] == ["x.rate"]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "x.tim")
    assert ended.value.code == 2
    assert "x.time, x.rate, y.shown" in capsys.readouterr().err


def test_a_function_that_measures_other_rows_than_it_registered_is_an_error(rows, tmp_path):
    @benchmark(FASTER)
    def measure(run):
        return {"x.tme": Pair((1.0,), (1.0,))}

    assert run(tmp_path) == (1, [])


def test_two_rows_of_one_name_are_refused(rows):
    benchmark(FASTER)(lambda run: {})
    with pytest.raises(ValueError, match=r"x\.time"):
        benchmark(FASTER)(lambda run: {})


def test_a_quick_run_measures_few_rounds_and_what_was_opened_is_closed(rows, tmp_path):
    seen = []

    @benchmark(FASTER)
    def measure(run):
        run.closing.callback(seen.append, "closed")
        seen.extend([run.rounds(9), run.rounds(2)])
        return {"x.time": Pair((1.0,), (1.0,))}

    run(tmp_path, "--quick")
    assert seen == [3, 2, "closed"]


def test_a_bench_that_is_told_to_end_leaves_nothing_behind():
    script = """
import runpy, sys, time
from bench import registry
registry.load = lambda: list(registry._benchmarks)
@registry.benchmark(registry.Row("x", unit="s", better="lower", goal=None, issue=1))
def forever(run):
    (run.folder / "file").touch()
    run.closing.callback(print, "closed", flush=True)
    print("folder", run.folder, flush=True)
    time.sleep(60)
sys.argv[1:] = []
runpy.run_module("bench", run_name="__main__")
"""
    with Child([sys.executable, "-c", script], env={"PYTHONPATH": str(TESTS)}) as bench:
        folder = Path(bench.wait_for("^folder (.*)$")[1])
        assert folder.exists()
        assert bench.stop() == 143
        assert bench.wait_for("^closed$")
    assert not folder.exists()
