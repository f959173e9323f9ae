"""The command: choose rows, measure, print the table as it grows, write the JSON."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from bench import registry
from bench.report import COLUMNS, Result, write_json

JSON = Path(__file__).resolve().parents[2] / "build" / "bench.json"


def main(arguments: list[str] | None = None, json: Path = JSON) -> int:
    """Run the benchmarks.

    Returns:
        0, also where goals are unmet (the machine may be busy), or 1 if one failed to run. Bad usage exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Compare ModelCache with its peers, both in this run, and print the ratios.",
    )
    parser.add_argument("names", nargs="*", help="rows to run: a name, the start of one (read.whole), or a wildcard")
    parser.add_argument("--quick", action="store_true", help="3 rounds each: a look, not a measurement")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    options = parser.parse_args(arguments)
    try:
        chosen = list(registry.select(registry.load(), options.names))
    except LookupError as error:
        parser.error(error.args[0])
    if options.list:
        for _, rows in chosen:
            print(*(row.name for row in rows), sep="\n")
        return 0

    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 4:
        print(f"The machine is busy (load {load:.1f} on {cores} cores): do not trust the figures.", file=sys.stderr)
    results, failed = [], False
    print(COLUMNS)
    for benchmark, rows in chosen:
        try:
            pairs = benchmark.run(quick=options.quick)
        except registry.NotMeasurable as why:
            print(*(f"{row.name:<36} not measured: {why}" for row in rows), sep="\n", flush=True)
            continue
        except Exception:  # noqa: BLE001 - whatever stopped one, the others are still measured
            traceback.print_exc()
            print(*(f"{row.name:<36} FAILED" for row in rows), sep="\n")
            failed = True
            continue
        for row in rows:
            results.append(Result(row, pairs[row.name], benchmark.otherwise_met(row, pairs)))
            print(results[-1].line(), flush=True)
    write_json(json, results)
    unmet = sum(result.unmet for result in results)
    print(f"{len(results)} rows, {unmet} unmet; written to {json}", file=sys.stderr)
    return 1 if failed else 0
