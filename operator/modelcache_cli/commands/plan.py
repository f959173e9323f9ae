"""`modelcache plan`: what would be fetched, and why."""

import argparse
from typing import TYPE_CHECKING

from modelcache_api.quantities import format_bytes
from modelcache_cli.command import Command
from modelcache_cli.fetching import FETCH_REASONS, fetch_options
from modelcache_cli.options import add_json, add_manifest
from modelcache_cli.output import emit, print_json, print_table, printable

if TYPE_CHECKING:
    from modelcache_fetcher import Plan


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_manifest(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_api.load import load_manifest
    from modelcache_fetcher import make_plan

    model = load_manifest(arguments.filename)
    plan = make_plan(model.spec, fetch_options(arguments, model))
    if arguments.json:
        print_json(plan.to_json())
    else:
        _print(plan)
    return 0


def _print(plan: "Plan") -> None:
    rows = [("+", format_bytes(file.size), file.path, file.why) for file in plan.files]
    rows += [("-", format_bytes(file.size), file.path, file.why) for file in plan.skipped]
    print_table(("", "size", "path", "why"), rows, right=(1,))
    left_out = sum(file.size for file in plan.skipped)
    emit()
    emit(f"source    {printable(plan.repo_id)}" + (f" at {plan.endpoint}" if plan.endpoint else ""))
    emit(f"revision  {plan.requested + ' = ' if plan.requested else ''}{plan.commit}")
    emit(f"fetched   {len(plan.files)} files, {format_bytes(plan.total_bytes)}")
    emit(f"left out  {len(plan.skipped)} files, {format_bytes(left_out)}")


COMMAND = Command(
    name="plan",
    summary="show which files would be fetched, and why each is in or out",
    description=(
        "Resolves the revision, lists the source and applies the patterns, as a fetch does. Nothing is downloaded "
        "and nothing is written. Files marked + would be fetched, files marked - are left out."
    ),
    examples=(
        ("modelcache plan -f minilm.yaml", "what this manifest would fetch"),
        ("modelcache plan -f minilm.yaml --json | jq .totalBytes", "its size in bytes"),
    ),
    add_options=_add_options,
    run=_run,
    reasons=FETCH_REASONS,
)
