"""What users meet when something is wrong: a sentence, an exit code, and nothing lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modelcache_api.reasons import INTERRUPTED
from modelcache_volume import Volume
from support.cli import (
    FREE_PORTS,
    SMALL,
    fetch_here,
    make_folder,
    refused,
    run_cli,
    serving,
    state,
    wait_until,
    write_manifest,
)
from support.fake_hub import fake_hub
from support.fetching import safetensors_bytes
from support.processes import Child


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "source")


@pytest.fixture
def manifest(tmp_path, source):
    return write_manifest(tmp_path / "mc.yaml", f"file://{source}")


@pytest.fixture
def volume(tmp_path, manifest):
    """A volume with the model fetched once."""
    fetch_here(manifest, tmp_path / "volume")
    return tmp_path / "volume"


# The manifest


def test_a_misspelt_field_is_told_with_line_and_what_was_meant(tmp_path):
    file = tmp_path / "mc.yaml"
    file.write_text(
        "apiVersion: modelcache.io/v1alpha1\nkind: ModelCache\nmetadata: {name: x}\nspec:\n  repoID: a/b\n"
        "  server: {replicas: two}\n"
    )
    for command in ("up", "plan"):
        assert refused(64, command, "-f", file).splitlines() == [
            f"{file}:4: spec.repoId: is missing; write where the model is, such as google-bert/bert-base-uncased",
            f"{file}:5: spec.repoID: unknown field; did you mean repoId?",
            f'{file}:6: spec.server.replicas: must be a whole number, not "two"',
        ]


def test_a_manifest_comes_from_standard_input_too():
    assert refused(64, "plan", "-f", "-", stdin="kind: Pod\n") == (
        "<stdin>:1: kind: is Pod; this command reads a ModelCache"
    )


def test_a_secret_of_the_cluster_has_to_be_given_as_files(tmp_path):
    file = write_manifest(tmp_path / "mc.yaml", "a/b", secretRef={"name": "hf-token"})
    assert "--secrets DIR" in refused(67, "plan", "-f", file)
    assert "there is no such folder" in refused(67, "plan", "-f", file, "--secrets", tmp_path / "none")


# The source


def test_a_missing_folder_and_patterns_that_match_nothing(tmp_path, source):
    file = write_manifest(tmp_path / "mc.yaml", f"file://{tmp_path}/none")
    assert f"{tmp_path}/none" in refused(68, "plan", "-f", file)
    file = write_manifest(tmp_path / "mc.yaml", f"file://{source}", allowPatterns=["*.Safetensors"])
    assert "model.safetensors" in refused(68, "plan", "-f", file)


def test_a_wrong_revision_leaves_what_is_active(tmp_path):
    with fake_hub(tmp_path / "hub") as hub:
        hub.commit("org/name", SMALL)
        root = tmp_path / "volume"
        fetch_here(write_manifest(tmp_path / "mc.yaml", "org/name", endpoint=hub.url), root)
        before = state(root)
        file = write_manifest(tmp_path / "mc.yaml", "org/name", endpoint=hub.url, revision="v9")
        message = refused(68, "fetch", "-f", file, "--volume", root)
        assert "v9" in message
        assert "org/name" in message
        assert state(root) == before


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-7], lambda content: b"\xff" * 8 + content[8:], lambda content: b"<html>" + content],
    ids=["truncated", "absurd header length", "a web page"],
)
def test_corrupted_weights_are_refused_and_what_is_active_stays(source, manifest, volume, damage):
    before = state(volume)
    (source / "model.safetensors").write_bytes(damage(SMALL["model.safetensors"]))
    assert "model.safetensors" in refused(69, "up", "-f", manifest, "--volume", volume, *FREE_PORTS)
    assert state(volume) == before


def test_a_link_out_of_the_source_is_not_followed(tmp_path, source, manifest):
    (tmp_path / "secret").write_text("secret")
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "secret")
    assert "config.json" in refused(65, "plan", "-f", manifest)


# The volume


def test_a_busy_volume_says_who_holds_it_and_is_left_alone(tmp_path, source, manifest, volume):
    before = state(volume)
    make_folder(source, {"new.json": b"{}"})
    with Volume.open(volume).lock():
        for command in (("fetch",), ("up", *FREE_PORTS)):
            assert f"process {os.getpid()}" in refused(84, *command, "-f", manifest, "--volume", volume)
        assert f"process {os.getpid()}" in refused(84, "prune", "--volume", volume)
        assert run_cli("ls", "--volume", volume).returncode == 0
    assert state(volume) == before


def test_a_second_fetch_can_wait_for_the_first(manifest, volume):
    opened = Volume.open(volume)
    with contextlib.ExitStack() as stack:
        with opened.lock():
            arguments = ("fetch", "-f", manifest, "--volume", volume, "--wait", "60s")
            child = stack.enter_context(Child.module("modelcache_cli", *arguments))
            wait_until(lambda: os.path.realpath(opened.layout.lock) in open_files(child.pid))
            assert child.process.poll() is None
        assert child.wait() == 0


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def test_a_volume_of_a_newer_format_is_not_touched(manifest, volume):
    (volume / "FORMAT").write_text("99\n")
    before = sorted(str(path) for path in volume.rglob("*"))
    for command in (("up", "-f", manifest, *FREE_PORTS), ("ls",)):
        assert "99" in refused(72, *command, "--volume", volume)
    nowhere = write_manifest(volume.parent / "nowhere.yaml", "org/name", endpoint="http://127.0.0.1:9")
    assert "99" in refused(72, "fetch", "-f", nowhere, "--volume", volume)  # before the source is asked for anything
    assert sorted(str(path) for path in volume.rglob("*")) == before


def test_a_folder_with_something_else_is_no_volume(tmp_path, manifest):
    home = make_folder(tmp_path / "home", {"thesis.txt": b"all my work"})
    assert "thesis" not in refused(71, "fetch", "-f", manifest, "--volume", home)
    refused(71, "prune", "--volume", home)
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]


def test_a_full_volume_keeps_what_is_active_and_says_how_much_is_missing(small_disk, source, manifest):
    root = small_disk / "volume"
    fetch_here(manifest, root)
    before = state(root)
    make_folder(source, {"model.safetensors": safetensors_bytes({"a": 40 * 2**20})})
    message = refused(70, "fetch", "-f", manifest, "--volume", root)
    assert "MiB" in message
    assert str(root) in message
    assert state(root) == before


def test_a_changed_blob_is_found_and_named(manifest, volume):
    opened = Volume.open(volume)
    (snapshot,) = opened.snapshots()
    blob = snapshot.blob_path(snapshot.file("model.safetensors"))
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(5 * 2**20)
        byte = file.read(1)
        file.seek(5 * 2**20)
        file.write(bytes([byte[0] ^ 1]))
    done = run_cli("verify", "--volume", volume)
    assert done.returncode == 74
    assert "modelcache: model.safetensors on the volume is not what was published" in done.stderr
    assert str(blob) in done.stderr
    mended = run_cli("fetch", "-f", manifest, "--volume", volume, "--verify")  # as the sentence says
    assert mended.returncode == 0, mended.stderr
    assert opened.snapshot(snapshot.digest).verify() == []


def test_up_mends_a_changed_blob_before_it_serves(source, manifest, volume):
    (snapshot,) = Volume.open(volume).snapshots()
    blob = snapshot.blob_path(snapshot.file("model.safetensors"))
    blob.chmod(0o644)
    blob.write_bytes(b"\xff" * blob.stat().st_size)
    write_manifest(manifest, f"file://{source}", server={"replicas": 0})
    done = run_cli("up", "-f", manifest, "--volume", volume)
    assert done.returncode == 0, done.stderr
    assert "is not what was published" in done.stderr
    assert snapshot.verify() == []


# Serving


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port", "--metrics-port"])
def test_a_port_in_use_is_told_before_anything_is_fetched(tmp_path, manifest, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = [*FREE_PORTS, option, str(port)]
        message = refused(75, "up", "-f", manifest, "--volume", tmp_path / "volume", *ports)
    assert f"port {port} " in message
    assert option in message
    assert not (tmp_path / "volume").exists()


def test_two_servers_cannot_share_a_port(tmp_path, volume):
    with serving("serve", "--volume", volume, ready=tmp_path / "ready.json") as (_, addresses):
        port = addresses["grpc"].rpartition(":")[2]
        message = refused(75, "serve", "--volume", volume, *FREE_PORTS, "--grpc-port", port)
        assert f"port {port} " in message


def test_a_host_that_is_not_this_machine(volume):
    for ports in (FREE_PORTS, ()):
        message = refused(75, "serve", "--volume", volume, *ports, "--host", "192.0.2.1")
        assert "--host 192.0.2.1: no address of this machine" in message


def test_a_cache_beyond_all_memory(volume):
    message = refused(2, "serve", "--volume", volume, *FREE_PORTS, "--cache-size", "999Ti")
    assert "1047527424 MiB" in message
    assert "--cache-size" in message


def test_an_index_of_shards_that_are_nowhere(tmp_path):
    files = {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}
    source = make_folder(tmp_path / "source", files)
    manifest = write_manifest(tmp_path / "mc.yaml", f"file://{source}", allowPatterns=["*"])
    assert "gone.safetensors" in refused(69, "fetch", "-f", manifest, "--volume", tmp_path / "volume")
    make_folder(source, {"gone.safetensors": safetensors_bytes({"a": 3})})
    manifest = write_manifest(tmp_path / "mc.yaml", f"file://{source}", allowPatterns=["*.json"])
    fetch_here(manifest, tmp_path / "volume")  # left out by patterns: the index is just a file


def test_serving_needs_something_active(tmp_path, volume):
    Volume.create(tmp_path / "empty")
    assert "fetch a model first" in refused(73, "serve", "--volume", tmp_path / "empty", *FREE_PORTS)
    assert "'nobody'" in refused(73, "serve", "--volume", volume, "--name", "nobody", *FREE_PORTS)


def test_serving_one_of_several_needs_its_name(tmp_path, source, volume):
    fetch_here(write_manifest(tmp_path / "other.yaml", f"file://{source}", name="other"), volume)
    assert "write --name: other, small" in refused(73, "serve", "--volume", volume, *FREE_PORTS)


# The command line


def test_wait_needs_a_server():
    assert "MODELCACHE_ADDRESS" in refused(2, "wait", env={"MODELCACHE_ADDRESS": ""})


def test_a_reader_that_goes_away_is_no_error_message(volume):
    shell = f"{sys.executable} -m modelcache_cli ls --json --volume {volume} | true"
    done = subprocess.run(
        ["bash", "-c", f"{shell}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.strip() in {"0", "141"}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["ls", "plan", "fetch"])
def test_a_full_disk_behind_standard_output_is_an_error(volume, manifest, command, unbuffered):
    arguments = {"ls": ["--volume", volume], "plan": ["-f", manifest], "fetch": ["-f", manifest, "--volume", volume]}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "modelcache_cli", command, *arguments[command]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr == "modelcache: standard output cannot be written: No space left on device\n"


def test_an_interrupt_while_the_program_still_starts_ends_it_without_a_word(manifest):
    """The first import that takes long is held back by a module of the test's; what happens then is not timing."""
    code = (
        "import importlib.abc, os, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'modelcache_cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from modelcache_cli.__main__ import run\n"
        "sys.exit(run())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "-f", manifest], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def test_debug_shows_the_traceback(tmp_path):
    done = run_cli("--debug", "ls", "--volume", tmp_path)
    assert done.returncode == 71
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_fetch_quietly_and_the_next_one_finishes(tmp_path, number, code):
    with fake_hub(tmp_path / "hub") as hub:
        hub.commit("org/name", {**SMALL, "model.safetensors": safetensors_bytes({"a": 24 * 2**20})})
        hub.fault("*/model.safetensors", times=-1, bytes_per_second=2 * 2**20)
        file = write_manifest(tmp_path / "mc.yaml", "org/name", endpoint=hub.url)
        arguments = ("fetch", "-f", file, "--volume", tmp_path / "volume")
        with Child.module("modelcache_cli", *arguments) as child:
            child.wait_for('"phase": "fetching"')
            child.process.send_signal(number)
            assert child.wait(20) == code
            assert all(line.startswith("{") for line in child.output.splitlines())
        hub.ledger.clear_faults()
        assert run_cli(*arguments).returncode == 0
        assert state(tmp_path / "volume")["active"]["small"][1] == 1
