"""The generated parts of docs/reference: tables of fields, exit codes and commands.

`PYTHONPATH=tests python -m support.reference` writes them anew between their markers; the tests compare.
"""

import argparse
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from modelcache_api.reasons import INTERRUPTED, REASONS, TERMINATED, USAGE
from modelcache_api.resource import ModelCacheSpec
from modelcache_api.status import ModelCacheStatus
from modelcache_cli import main as program
from modelcache_cli.command import Command
from support.processes import REPOSITORY

FOLDER = REPOSITORY / "docs" / "reference"


def updated(text: str) -> str:
    """A document's text with its generated parts as they should be."""

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}\n{PARTS[found[2]]()}{found[3]}"

    return re.sub(r"(<!-- generated: ([a-z ]+) -->\n)(?:.|\n)*?(<!-- end -->)", part, text)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        described = (info.description or "").replace("|", "\\|")
        yield f"| `{path}` | {_kind(info.annotation)} | {_default(info)} | {described} |"
        child = _model(info.annotation)
        if child is not None:
            yield from _fields(child, f"{path}[]." if _is_list(info.annotation) else f"{path}.")


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ["| Field | Type | Default | Meaning |", "| --- | --- | --- | --- |", *_fields(model, prefix)]
    return "\n".join(rows) + "\n\n"


def _plain(annotation: Any) -> Any:
    """Without Annotated and None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        (only,) = [item for item in get_args(annotation) if item is not type(None)]
        return _plain(only)
    return annotation


def _is_list(annotation: Any) -> bool:
    return get_origin(_plain(annotation)) is list


def _model(annotation: Any) -> type[BaseModel] | None:
    plain = _plain(annotation)
    if get_origin(plain) is list:
        return _model(get_args(plain)[0])
    return plain if isinstance(plain, type) and issubclass(plain, BaseModel) else None


def _kind(annotation: Any) -> str:
    plain = _plain(annotation)
    if get_origin(plain) is list:
        return f"list of {_kind(get_args(plain)[0])}"
    if get_origin(plain) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(plain))
    if get_origin(plain) is dict:
        return "mapping"
    if plain in {str, int, bool}:
        return {str: "string", int: "integer", bool: "boolean"}[plain]
    return "object"


def _default(info: Any) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or isinstance(value, BaseModel) or value in ({}, [], ""):
        return ""
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _codes() -> str:
    rows = ["| Code | Reason | Try again? | What happened | What to do |", "| --- | --- | --- | --- | --- |"]
    for reason, info in REASONS.items():
        again = "no" if info.permanent else "yes"
        rows.append(f"| {info.exit_code} | {reason} | {again} | {info.summary} | {info.remedy} |")
    rows.append(f"| {USAGE} | | no | the command line is wrong | see `--help` |")
    rows.append(f"| {INTERRUPTED} | | yes | stopped by Ctrl-C | |")
    rows.append(f"| {TERMINATED} | | yes | stopped by SIGTERM before it was done | |")
    return "\n".join(rows) + "\n\n"


def _commands() -> str:
    parser = program._parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return "\n".join(_command(command, commands.choices[command.name]) for command in program.COMMANDS) + "\n"


def _command(command: Command, parser: argparse.ArgumentParser) -> str:
    lines = [f"## modelcache {command.name}", "", command.description, "", "| Option | Meaning |", "| --- | --- |"]
    for action in parser._actions:
        if action.dest in {"help", "debug"}:
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        value = f" {action.metavar}" if action.nargs is None else ""
        meaning = (action.help or "") % {"default": action.default}
        lines.append(f"| {names}{value} | {meaning} |")
    if command.environment:
        lines += ["", *(f"- `{variable}`: {meaning}" for variable, meaning in command.environment)]
    codes = ", ".join(f"{code} {reason}" for code, reason in sorted((REASONS[r].exit_code, r) for r in command.reasons))
    lines += ["", f"Exit codes beside 0, 1, 2, 95, 130 and 143: {codes}.", "", "```bash"]
    lines += [f"{line}   # {what}" for line, what in command.examples]
    return "\n".join([*lines, "```"]) + "\n"


PARTS = {
    "spec": lambda: _table(ModelCacheSpec, "spec."),
    "status": lambda: _table(ModelCacheStatus, "status."),
    "exit codes": _codes,
    "commands": _commands,
}


def documents() -> list[Path]:
    """The documents with generated parts."""
    return [FOLDER / "resource.md", FOLDER / "cli.md"]


if __name__ == "__main__":
    for document in documents():
        document.write_text(updated(document.read_text()))
