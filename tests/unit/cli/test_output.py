"""What is printed can be read by people, by programs, and does nothing to a terminal."""

import argparse
import json

import pytest

from modelcache_cli.options import cache_size, default_volume, digest_prefix, duration, whole_blocks
from modelcache_cli.output import ByteCounter, ProgressDisplay, print_table, printable, say

MIB = 2**20


def test_control_characters_of_foreign_names_are_shown_not_obeyed(capsys):
    assert printable("a\x1b[31mb\n\u202ec") == "a\\x1b[31mb\\n\\u202ec"
    say("a\x1b[31mb\n")
    assert capsys.readouterr().err == "a\\x1b[31mb\\n\n"
    print_table(("name", "size"), [("\x1b]0;x", "1"), ("b", "22")], right=(1,))
    assert capsys.readouterr().out == "NAME      SIZE\n\\x1b]0;x     1\nb           22\n"


def test_the_last_line_of_progress_tells_the_end_even_when_the_work_was_quick(capsys):
    counter = ByteCounter("verifying", 10)
    with ProgressDisplay(counter.counters, "verify"):
        counter.add(10)
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line)
    assert (shown["phase"], shown["bytes"], shown["totalBytes"]) == ("verifying", 10, 10)


def test_progress_ends_with_the_work_also_when_it_fails(capsys):
    with pytest.raises(ZeroDivisionError), ProgressDisplay(ByteCounter("x", 1).counters, "x") as display:
        raise ZeroDivisionError
    assert not display._thread.is_alive()
    assert capsys.readouterr().out.count("\n") == 1


def test_cache_sizes_are_whole_blocks_of_at_least_64_mib():
    assert cache_size("1") == 64 * MIB
    assert cache_size("65Mi") == 68 * MIB
    assert cache_size("1Gi") == 1024 * MIB
    assert whole_blocks(0) == 64 * MIB


@pytest.mark.parametrize(
    ("parse", "text"),
    [(cache_size, "-1"), (duration, "10"), (digest_prefix, "abc")],
)
def test_values_that_mean_nothing_are_refused_with_what_to_write(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"; write |more than"):
        parse(text)


def test_a_client_told_to_map_no_volume_does_not_name_the_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("MODELCACHE_VOLUME", "off")
    assert default_volume() == tmp_path / "modelcache"


def test_the_default_volume(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELCACHE_VOLUME", str(tmp_path))
    assert default_volume() == tmp_path
    monkeypatch.delenv("MODELCACHE_VOLUME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert str(default_volume()) == "/data/modelcache"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_volume()) == "/home/me/.local/share/modelcache"
