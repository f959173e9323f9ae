"""Entry point of `modelcache`: parses, runs one command, and turns every end into a sentence and an exit code."""

import argparse
import logging
import os
import signal
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from modelcache_api.reasons import INTERRUPTED, TERMINATED
from modelcache_cli.command import Command, wrapped
from modelcache_cli.commands import fetch, ls, plan, prune, serve, up, verify, wait
from modelcache_cli.failures import explain
from modelcache_cli.output import say, writing

PROGRAM = "modelcache"
BROKEN_PIPE = 141
"""As shells report SIGPIPE: whoever read the output has gone."""

COMMANDS: tuple[Command, ...] = (
    up.COMMAND,
    plan.COMMAND,
    fetch.COMMAND,
    serve.COMMAND,
    verify.COMMAND,
    ls.COMMAND,
    prune.COMMAND,
    wait.COMMAND,
)

_DESCRIPTION = (
    "Keeps one model's weights where they are used: fetched once into a volume, verified, and served to any number of "
    "readers. On one machine `modelcache up -f FILE` does all of it, with the same manifest that goes to a cluster."
)

_CODES = (
    "Errors are sentences on standard error; the exit code says which kind: 64 to 79 stay until you change something, "
    "80 to 95 may heal by trying again (see each command's help)."
)

_EXAMPLES = """\
examples:
  modelcache up -f minilm.yaml
      fetch and serve a model on this machine until Ctrl-C
  modelcache plan -f minilm.yaml
      show what would be fetched, and why
  modelcache wait --address localhost:9090
      wait until a server has a model"""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwinds like Ctrl-C, ends with another exit code."""


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show log messages, and tracebacks instead of sentences",
    )
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=wrapped(_DESCRIPTION),
        epilog=f"{wrapped(_CODES)}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.summary,
            description=wrapped(command.description),
            epilog=command.epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
            allow_abbrev=False,
        )
        command.add_options(subparser)
        subparser.set_defaults(command=command, parser=subparser)
    return parser


def _version() -> str:
    try:
        return version("modelcache")
    except PackageNotFoundError:
        return "(not installed)"


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None: the process's own.

    Returns:
        The process's exit code.
    """
    debug = False
    try:
        signal.signal(signal.SIGTERM, _terminate)
        if callable(signal.getsignal(signal.SIGINT)):  # not where a shell has it ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments, unknown = _parser().parse_known_args(argv)
        if unknown:
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        debug = getattr(arguments, "debug", False)
        logging.basicConfig(
            level=logging.DEBUG if debug else logging.ERROR, format=f"{PROGRAM}: %(levelname)s %(name)s: %(message)s"
        )
        if not debug:
            logging.getLogger("modelcache_fetcher").setLevel(logging.WARNING)  # what is left out, what is planned anew
        code: int = arguments.command.run(arguments)
        with writing():
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        _second_signal_kills()
        return TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the last place that can turn an error into a sentence
        code, text = explain(error)
        if debug:
            traceback.print_exc()
        for line in text.splitlines() or [type(error).__name__]:
            say(f"{PROGRAM}: {line}")
    _drop_unwritable_output()
    return code


def _drop_unwritable_output() -> None:
    """The interpreter flushes standard output once more at exit, and would complain of a pipe or disk anew."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _second_signal_kills() -> None:
    """Whoever presses Ctrl-C again while things are being stopped wants out."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
