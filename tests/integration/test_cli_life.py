"""The life cycle on one machine, through the command line alone."""

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import termios
import urllib.request
from pathlib import Path

import pytest

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
from support.fetching import safetensors_bytes
from support.processes import REPOSITORY, Child
from support.server_security import AUDIENCE, ISSUER, Issuer, write_certificate


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "source")


@pytest.fixture
def manifest(tmp_path, source):
    return write_manifest(tmp_path / "mc.yaml", f"file://{source}", server={"cacheSize": "64Mi"})


@pytest.fixture
def root(tmp_path):
    return tmp_path / "volume"


def read(addresses: dict[str, str], digest: str, path: str) -> bytes:
    with urllib.request.urlopen(f"{addresses['http']}/v1/snapshots/{digest}/{path}", timeout=30) as response:
        return response.read()


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def test_plan_says_why_each_file_is_in_or_out_and_writes_nothing(tmp_path, source, root):
    file = write_manifest(
        tmp_path / "mc.yaml", f"file://{source}", allowPatterns=["*.json", "*.safetensors"], ignorePatterns=["conf*"]
    )
    done = run_cli("plan", "-f", file, "--json", env={"MODELCACHE_VOLUME": str(root)})
    plan = json.loads(done.stdout)
    assert {file["path"] for file in plan["files"]} == {"model.safetensors"}
    assert {file["path"]: file["why"] for file in plan["skipped"]} == {
        "README.md": "matches none of allowPatterns",
        "config.json": "matches ignorePatterns 'conf*'",
    }
    assert plan["totalBytes"] == len(SMALL["model.safetensors"])
    table = run_cli("plan", "-f", file).stdout
    assert [line[0] for line in table.splitlines() if line.startswith(("+", "-"))] == ["+", "-", "-"]
    assert plan["commit"] in table
    assert not root.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_up_serves_until_it_is_told_to_stop_and_leaves_no_trace(tmp_path, manifest, root, number, code):
    ready = tmp_path / "ready.json"
    with serving("up", "-f", manifest, "--volume", root, ready=ready) as (child, addresses):
        (active,) = Volume.open(root).actives()
        assert set(addresses) == {"name", "volume", "grpc", "http", "metrics"}
        assert (addresses["name"], addresses["volume"]) == ("small", str(root))
        assert f'StreamingBertModel("small", address="{addresses["grpc"]}")' in child.output
        for path, content in SMALL.items():
            assert read(addresses, active.digest, path) == content
        child.process.send_signal(number)
        assert child.wait(30) == code
        assert "Traceback" not in child.output
        assert child.output.splitlines()[-1] == "Ctrl-C stops it."
    assert not ready.exists()
    assert not answers(addresses["grpc"])


def test_up_again_downloads_nothing(manifest, root, tmp_path):
    before = fetch_here(manifest, root)
    with serving("up", "-f", manifest, "--volume", root, ready=tmp_path / "ready.json") as (child, _):
        assert "all there already" in child.output
        assert state(root)["active"] == {"small": (before.digest, before.generation)}


def test_a_name_that_comes_to_stand_for_another_source_is_said(tmp_path, source, manifest, root):
    assert "note:" not in run_cli("fetch", "-f", manifest, "--volume", root).stderr
    other = write_manifest(tmp_path / "other.yaml", f"file://{make_folder(tmp_path / 'elsewhere')}")
    done = run_cli("fetch", "-f", other, "--volume", root)
    assert f"note: small was file://{source} until now" in done.stderr
    assert done.stderr.rstrip().endswith(f"serves file://{tmp_path / 'elsewhere'}")


def test_up_verifies_before_it_serves_what_was_there_already(manifest, root):
    fetch_here(manifest, root)
    done = run_cli("up", "-f", write_manifest(manifest, json.loads(manifest.read_text())["spec"]["repoId"],
                                              server={"replicas": 0}), "--volume", root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    phases = [json.loads(line)["phase"] for line in done.stdout.splitlines()]
    assert phases[-1] == "verifying"
    assert "HF_HUB_CACHE=" in done.stderr


def test_a_suspended_model_is_served_as_it_is(tmp_path, source, manifest, root):
    before = fetch_here(manifest, root)
    make_folder(source, {"new.json": b"{}"})
    write_manifest(manifest, f"file://{source}", suspend=True)
    with serving("up", "-f", manifest, "--volume", root, ready=tmp_path / "ready.json") as (child, addresses):
        assert "spec.suspend is true" in child.output
        assert read(addresses, before.digest, "config.json") == SMALL["config.json"]


def test_what_a_cluster_would_protect_is_said_to_be_open_here(tmp_path, source, manifest, root):
    access = {"mode": "Token", "serviceAccounts": [{"name": "default"}]}
    write_manifest(manifest, f"file://{source}", server={"access": access, "replicas": 0}, storage={"size": "1Gi"})
    said = run_cli("up", "-f", manifest, "--volume", root).stderr
    assert "whoever reaches --host can read" in said
    assert "spec.storage.size: not applied on one machine" in said


def test_a_place_for_the_ready_file_is_checked_before_anything_is_fetched(manifest, root):
    done = run_cli("up", "-f", manifest, "--volume", root, *FREE_PORTS, "--ready-file", "/nowhere/ready.json")
    assert done.returncode == 2, done.stderr
    assert "--ready-file /nowhere/ready.json" in done.stderr
    assert not root.exists()


def test_a_fetch_beside_a_server_is_served_without_a_restart_and_wait_tells(tmp_path, source, manifest, root):
    first = fetch_here(manifest, root)
    with serving("serve", "--volume", root, ready=tmp_path / "ready.json") as (child, addresses):
        wait = ("wait", "--address", addresses["grpc"])
        assert run_cli(*wait).stdout.strip() == first.digest
        make_folder(source, {"config.json": b'{"model_type": "other"}'})
        second = fetch_here(manifest, root)
        assert run_cli(*wait, "--digest", second.digest[:12]).stdout.strip() == second.digest
        assert run_cli(*wait, "--revision", second.commit[:12]).stdout.strip() == second.digest
        message = refused(86, *wait, "--digest", first.digest, "--timeout", "0s")
        assert f"still serves the digest {second.digest[:12]}, not {first.digest[:12]}" in message
        assert read(addresses, second.digest, "config.json") == b'{"model_type": "other"}'
        assert read(addresses, first.digest, "config.json") == SMALL["config.json"]
        assert child.process.poll() is None


def test_wait_says_why_it_waits_and_gives_up_in_time():
    message = refused(86, "wait", "--address", "127.0.0.1:1", "--timeout", "1s")
    assert message.startswith("waited 1 s in vain: 127.0.0.1:1 does not answer")


def test_ls_shows_sources_names_and_readers(manifest, root):
    result = fetch_here(manifest, root)
    volume = Volume.open(root)
    volume.renew_lease(result.digest, "pod-1")
    (row,) = json.loads(run_cli("ls", "--volume", root, "--json").stdout)["snapshots"]
    assert row["digest"] == result.digest
    assert (row["activeAs"], row["readers"], row["files"]) == (["small"], ["pod-1"], len(SMALL))
    assert row["bytes"] == sum(map(len, SMALL.values()))
    assert Path(row["folder"], "config.json").read_bytes() == SMALL["config.json"]
    header, line = run_cli("ls", "--volume", root).stdout.splitlines()
    assert header.split()[0] == "DIGEST"
    assert line.startswith(result.digest[:12])


def test_the_volume_comes_from_the_environment(manifest, root, tmp_path):
    assert run_cli("fetch", "-f", manifest, env={"MODELCACHE_VOLUME": str(root)}).returncode == 0
    assert Volume.open(root).actives()
    data = {"MODELCACHE_VOLUME": "", "XDG_DATA_HOME": str(tmp_path)}
    assert f"{tmp_path}/modelcache" in refused(71, "ls", env=data)


def test_prune_removes_what_nobody_needs_and_says_so_before(source, manifest, root):
    digests = []
    volume = None
    for number in range(3):
        make_folder(source, {"model.safetensors": safetensors_bytes({"a": 2**20 + number})})
        digests.append(fetch_here(manifest, root).digest)
        volume = Volume.open(root)
        volume.renew_lease(digests[-1], "reader")  # or the next fetch would prune it
    assert volume is not None
    assert len(volume.snapshots()) == 3
    os.utime(volume.layout.lease(digests[0], "reader"), (0, 0))
    before = state(root)

    dry = run_cli("prune", "--volume", root, "--dry-run")
    assert dry.stdout.split() == [digests[0]]
    assert "would be removed" in dry.stderr
    assert state(root) == before

    kept = run_cli("prune", "--volume", root, "--keep", digests[0][:8])
    assert kept.stdout == ""
    assert state(root) == before

    pruned = run_cli("prune", "--volume", root)
    assert pruned.stdout.split() == [digests[0]]
    assert pruned.stderr.splitlines()[-1].partition(",")[2] == dry.stderr.splitlines()[-1].partition(",")[2]
    assert set(state(root)["snapshots"]) == set(digests[1:])


def test_progress_is_json_lines_when_nobody_watches(manifest, root):
    done = run_cli("fetch", "-f", manifest, "--volume", root)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["phase"] == "done"
    assert last["bytes"] == last["totalBytes"] == sum(map(len, SMALL.values()))
    assert "digest" in done.stderr


def test_progress_is_a_bar_on_a_terminal(manifest, root):
    terminal, side = os.openpty()
    termios.tcsetwinsize(side, (24, 100))
    with os.fdopen(terminal, "rb") as watcher:
        command = [sys.executable, "-m", "modelcache_cli", "fetch", "-f", manifest, "--volume", root]
        done = subprocess.run(command, stdout=side, stderr=side, check=False, timeout=60)
        os.close(side)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while chunk := os.read(watcher.fileno(), 65536):
                shown += chunk
    assert done.returncode == 0
    assert b"fetch small: 100%" in shown
    assert b'"phase"' not in shown


# The demonstration


def processes_of(marker: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def test_make_run_streams_the_real_model_and_proves_it_equal():
    mark = f"DEMONSTRATION={os.getpid()}-whole"
    before = set((REPOSITORY / "build").glob("run-*"))
    name, _, value = mark.partition("=")
    with Child([sys.executable, REPOSITORY / "examples" / "run_minilm.py"], env={name: value}) as demonstration:
        assert demonstration.wait(240) == 0
        output = demonstration.output
    assert "torch.equal(streamed, transformers from local files): True" in output
    assert "First result" in output
    assert "Cosine similarity" in output
    assert processes_of(mark) == []
    assert set((REPOSITORY / "build").glob("run-*")) <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_demonstration_stops_what_it_started(number):
    mark = f"DEMONSTRATION={os.getpid()}-{number}"
    name, _, value = mark.partition("=")
    with Child([sys.executable, REPOSITORY / "examples" / "run_minilm.py"], env={name: value}) as demonstration:
        demonstration.wait_for("Another process")
        assert len(processes_of(mark)) >= 2
        demonstration.process.send_signal(number)
        assert demonstration.wait(60) == 128 + number
        wait_until(lambda: not processes_of(mark), 10)


def test_serve_takes_what_the_server_takes(tmp_path, manifest, root):
    fetch_here(manifest, root)
    chain, key = write_certificate(tmp_path)
    issuer = Issuer()
    issuer.add_ec("a")
    options = (
        "--tls-cert", chain, "--tls-key", key, "--token-key-set", issuer.publish(tmp_path / "keys.json"),
        "--token-issuer", ISSUER, "--token-audience", AUDIENCE, "--allow", "default/reader", "--warmup", "none",
        "--log-level", "info", "--log-format", "json",
    )  # fmt: skip
    with serving("serve", "--volume", root, *options, ready=tmp_path / "ready.json") as (child, addresses):
        assert addresses["grpc"].startswith("grpcs://127.0.0.1:")
        scheme, _, port = addresses["http"].rpartition(":")
        assert scheme == "https://127.0.0.1"
        context = ssl.create_default_context(cafile=str(chain))
        path = f"/v1/snapshots/{Volume.open(root).active('small').digest}/README.md"
        for token, status in ((issuer.token(seconds=60), 200), ("wrong", 401)):
            connection = http.client.HTTPSConnection("localhost", int(port), context=context, timeout=30)
            with contextlib.closing(connection):
                connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
                assert connection.getresponse().status == status
        trusting = {"MODELCACHE_CA_FILE": str(chain)}
        wait = ("wait", "--address", addresses["grpc"], "--timeout", "20s")
        assert "refuses this caller" in refused(66, *wait, env=trusting)
        token = tmp_path / "token"
        token.write_text(issuer.token(seconds=60))
        known = {**trusting, "MODELCACHE_TOKEN_FILE": str(token)}
        assert run_cli(*wait, env=known).stdout.strip() == Volume.open(root).active("small").digest
        assert "cannot be read" in refused(2, *wait, env={**known, "MODELCACHE_TOKEN_FILE": "/nowhere"})
        child.wait_for(r'"code": "401"')


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--tls-cert", "missing.pem"), "--tls-cert and --tls-key belong together"),
        (("--tls-cert", "missing.pem", "--tls-key", "missing.pem"), "TLS is not possible with missing.pem"),
        (("--token-issuer", "x"), "belong together: give all four"),
        (("--redis-url-file", "missing"), "missing"),
    ],
)
def test_serve_refuses_what_the_server_refuses(manifest, root, options, sentence):
    fetch_here(manifest, root)
    assert sentence in refused(2, "serve", "--volume", root, *FREE_PORTS, *options)
