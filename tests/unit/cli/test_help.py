"""The help says everything a user needs, and reading it costs nothing."""

import argparse
import re
import subprocess
import sys

import pytest

from modelcache_api.reasons import REASONS, Reason
from modelcache_cli import main as program
from modelcache_cli.failures import explain

SUBPARSERS: dict[str, argparse.ArgumentParser] = next(
    action.choices for action in program._parser()._actions if isinstance(action, argparse._SubParsersAction)
)
BLOCK_EXTRAS = """
import sys
from importlib.abc import MetaPathFinder
BLOCKED = {"pydantic", "yaml", "huggingface_hub", "tqdm", "torch", "transformers", "safetensors", "numpy",
           "grpc_health", "grpc_reflection", "prometheus_client", "boto3", "google.cloud", "kopf", "kubernetes"}
class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from modelcache_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def base_installation(*arguments) -> subprocess.CompletedProcess[str]:
    """Run a command as if no extra were installed."""
    command = [sys.executable, "-c", BLOCK_EXTRAS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_commands_are_those_of_the_design():
    assert list(SUBPARSERS) == ["up", "plan", "fetch", "serve", "verify", "ls", "prune", "wait"]


@pytest.mark.parametrize("name", SUBPARSERS)
def test_every_option_is_explained_and_every_value_has_a_unit_or_form(name):
    for action in SUBPARSERS[name]._actions:
        assert action.help, action.option_strings
        if action.nargs is None and "-f" not in action.option_strings:
            assert action.metavar
            assert "default" in action.help or action.default in (None, []), action.option_strings


@pytest.mark.parametrize("name", SUBPARSERS)
def test_every_help_has_exit_codes_examples_and_environment(name):
    command = next(command for command in program.COMMANDS if command.name == name)
    text = SUBPARSERS[name].format_help()
    assert len(command.description) > 100
    for code in (0, 1, 2, 95, 130, 143, *(REASONS[reason].exit_code for reason in command.reasons)):
        assert re.search(rf"^  {code} +\S", text, re.MULTILINE), f"{name} does not list exit code {code}"
    for variable, _ in command.environment:
        assert variable in text
    assert command.examples
    for line, _ in command.examples:
        assert line in text


@pytest.mark.parametrize("name", SUBPARSERS)
def test_examples_are_command_lines_that_are_understood(name):
    command = next(command for command in program.COMMANDS if command.name == name)
    for line, _ in command.examples:
        words = line.partition("|")[0].split()
        assert words[:2] == ["modelcache", name]
        assert program._parser().parse_args(words[1:]).command is command


@pytest.mark.parametrize("extra", ["abc", "--alll"])
def test_an_argument_that_a_command_does_not_know_is_told_with_its_own_usage(extra):
    done = base_installation("verify", extra)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: modelcache verify ")
    assert done.stderr.endswith(f"modelcache verify: error: unrecognized arguments: {extra}\n")


def test_no_line_is_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = program._parser()
    assert max(map(len, parser.format_help().splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("up",),
        ("serve", "--grpc-port", "65536"),
        ("serve", "--grpc-port", "-1"),
        ("serve", "--cache-size", "big"),
        ("serve", "--grace", "5"),
        ("ls", "--jso"),
        ("verify", "--digest", "xyz"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        program._parser().parse_args(arguments)
    assert end.value.code == 2
    assert "usage: modelcache" in capsys.readouterr().err


def test_help_and_version_need_the_base_installation_only():
    done = base_installation("--help")
    assert done.returncode == 0, done.stderr
    for command in program.COMMANDS:
        assert re.search(rf"^    {command.name} ", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"modelcache \d+\.\d+\.\d+.*\n", base_installation("--version").stdout)
    assert base_installation("up", "--help").returncode == 0


def test_wait_and_ls_need_the_base_installation_only(tmp_path):
    done = base_installation("wait", "--address", "127.0.0.1:1", "--timeout", "0s")
    assert (done.returncode, done.stderr.count("does not answer")) == (86, 1)
    assert base_installation("ls", "--volume", str(tmp_path)).returncode == 71


def test_a_missing_extra_is_a_sentence_with_the_command_that_installs_it():
    done = base_installation("plan", "-f", "x.yaml")
    assert done.returncode == 76
    assert done.stderr.startswith("modelcache: this command needs the package ")
    assert done.stderr.endswith(": pip install 'modelcache[fetch]'\n")


def test_a_bug_is_called_one():
    code, text = explain(KeyError("x"))
    assert code == REASONS[Reason.INTERNAL].exit_code
    assert text == "unexpected KeyError: 'x'; this is probably a bug: run with --debug and report it"
    assert explain(ModuleNotFoundError("No module named 'foo'", name="foo"))[0] == REASONS[Reason.INTERNAL].exit_code


def test_errors_of_the_operating_system_name_the_file():
    assert explain(PermissionError(13, "Permission denied", "/x")) == (1, "/x: Permission denied")
    assert explain(OSError(28, "No space left on device", "/x"))[0] == REASONS[Reason.NO_SPACE].exit_code
