"""What a command is: its place in the help, its options, and what it does."""

import argparse
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from modelcache_api.reasons import INTERRUPTED, REASONS, TERMINATED, USAGE, Reason


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name: As it is typed.
        summary: One line of `modelcache --help`, without a full stop.
        description: The paragraph at the beginning of its own help.
        examples: Command lines with what they do.
        add_options: Adds its options to its parser.
        run: Does it, and returns the exit code. Raises what `failures.explain` can put into a sentence.
        reasons: How it can fail, beside what every command can.
        environment: Variables that it reads, with what they mean.
    """

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    reasons: tuple[Reason, ...]
    environment: tuple[tuple[str, str], ...] = field(default=())

    def epilog(self) -> str:
        """Environment, exit codes and examples, as they stand at the end of the help."""
        codes = [(0, "done")]
        codes += [(1, "an error of the operating system, such as no permission"), (USAGE, "the command line is wrong")]
        codes += [(REASONS[reason].exit_code, f"{reason}: {REASONS[reason].summary}") for reason in self.reasons]
        codes += [(REASONS[Reason.INTERNAL].exit_code, f"{Reason.INTERNAL}: {REASONS[Reason.INTERNAL].summary}")]
        codes += [(INTERRUPTED, "stopped by Ctrl-C"), (TERMINATED, "stopped by SIGTERM before it was done")]
        parts = []
        if self.environment:
            parts.append("environment variables:\n" + _two_columns(self.environment))
        parts.append("exit codes:\n" + _two_columns([(str(code), what) for code, what in sorted(codes)]))
        examples = "\n".join(f"  {line}\n      {what}" for line, what in self.examples)
        parts.append(f"examples:\n{examples}")
        return "\n\n".join(parts)


def wrapped(text: str) -> str:
    """A paragraph, as wide as argparse writes its own."""
    return "\n".join(textwrap.wrap(text, _width(), break_long_words=False, break_on_hyphens=False))


def _width() -> int:
    return max(shutil.get_terminal_size().columns - 2, 40)


def _two_columns(rows: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    indent = " " * (width + 4)
    lines = []
    for left, right in rows:
        first, *rest = textwrap.wrap(right, max(_width() - len(indent), 20), break_long_words=False)
        lines += [f"  {left:{width}}  {first}", *(indent + line for line in rest)]
    return "\n".join(lines)
