"""The program that Jobs run: modelcache-fetch."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from modelcache_api.reasons import REASONS, TERMINATED, Reason
from support.fake_hub import fake_hub
from support.fetching import contents, safetensors_bytes

TOKEN = "hf_SecretSecretSecretSecretSecretSecret"
BIG = safetensors_bytes({"a": 24 * 2**20})
FILES = {"config.json": b"{}", "model.safetensors": BIG}


@pytest.fixture
def hub():
    with fake_hub() as hub:
        hub.commit("org/name", FILES)
        yield hub


def start(*arguments, spec=None, **options):
    environment = {key: value for key, value in os.environ.items() if key != "MODELCACHE_SPEC"}
    if spec is not None:
        environment["MODELCACHE_SPEC"] = json.dumps(spec)
    command = [sys.executable, "-m", "modelcache_fetcher", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(*arguments, spec=None):
    process = start(*arguments, spec=spec)
    out, err = process.communicate(timeout=60)
    assert TOKEN not in out + err
    return process.returncode, out, err


def test_plan_says_commit_files_and_bytes_in_its_termination_message(hub, tmp_path):
    spec = {"repoId": "org/name", "endpoint": hub.url}
    code, out, _ = run("plan", "--details", "--termination-log", tmp_path / "message", spec=spec)
    assert code == 0
    message = json.loads((tmp_path / "message").read_text())
    assert (message["result"], message["files"], message["bytes"]) == ("planned", 2, len(BIG) + 2)
    assert len(message["commit"]) == 40
    assert "no allowPatterns are given" in out


def test_the_default_hub_is_the_one_of_hf_endpoint(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    code, out, err = run("plan", spec={"repoId": "org/name"})
    assert code == 0, err
    assert json.loads(out)["bytes"] == len(BIG) + 2


def test_fetch_publishes_and_reports(hub, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"repoId": "org/name", "endpoint": hub.url}))
    log = tmp_path / "message"
    code, out, err = run("fetch", "--spec", spec, "--volume", tmp_path / "v", "--name", "m", "--termination-log", log)
    assert code == 0, err
    message = json.loads(log.read_text())
    assert (message["result"], message["files"], message["downloadedBytes"]) == ("fetched", 2, len(BIG) + 2)
    assert json.loads(out.splitlines()[-1]) == message
    assert contents(tmp_path / "v", "m") == FILES


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (None, Reason.INVALID_SPEC),
        ({"repoId": "not a repo"}, Reason.INVALID_SPEC),
        ({"repoId": "org/missing"}, Reason.NOT_FOUND),
        ({"repoId": "org/name", "secretRef": {"name": "absent"}}, Reason.SECRET_MISSING),
        ({"repoId": "file:///no/such/folder"}, Reason.NOT_FOUND),
    ],
)
def test_a_failure_is_an_exit_code_and_a_message(hub, tmp_path, spec, reason):
    if spec is not None and "file:" not in spec["repoId"]:
        spec = {**spec, "endpoint": hub.url}
    log = tmp_path / "message"
    code, out, err = run("fetch", "--volume", tmp_path / "v", "--name", "m", "--termination-log", log, spec=spec)
    assert code == REASONS[reason].exit_code
    assert json.loads(log.read_text())["reason"] == reason
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["reason"] == reason


def slow_fetch(hub, tmp_path, *more):
    hub.fault("/files/*", times=-1, bytes_per_second=4_000_000)
    spec = {"repoId": "org/name", "endpoint": hub.url, "fetch": {"concurrency": 2}}
    return start("fetch", "--volume", tmp_path / "v", "--name", "m", *more, spec=spec)


def test_progress_is_printed_each_second_and_served(hub, tmp_path):
    process = slow_fetch(hub, tmp_path, "--progress-port", "0")
    try:
        told = (json.loads(line)["progress"] for line in process.stdout)
        lines = list(itertools.islice((each for each in told if each["bytes"]), 2))
    finally:
        process.kill()
        process.communicate()
    assert lines[0]["totalBytes"] == len(BIG) + 2
    assert 0 < lines[0]["bytes"] < lines[1]["bytes"]


def test_progress_over_http():
    from modelcache_fetcher import Progress
    from modelcache_fetcher.progress_server import ProgressServer

    progress = Progress()
    progress.begin("fetching", total_bytes=10, files=1)
    progress.received(4)
    server = ProgressServer(progress, 0)
    server.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/progress") as answer:
            assert json.load(answer)["bytes"] == 4
    finally:
        server.stop()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_fetch_is_continued(hub, tmp_path, sent, code):
    process = slow_fetch(hub, tmp_path)
    wait_for(lambda: hub.ledger.bytes_sent("/files/*") > 6_000_000)
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == code
    hub.ledger.clear_faults()
    status, _, err = run(
        "fetch", "--volume", tmp_path / "v", "--name", "m", spec={"repoId": "org/name", "endpoint": hub.url}
    )
    assert status == 0, err
    assert contents(tmp_path / "v", "m") == FILES
    assert hub.ledger.bytes_sent("/files/*") < len(BIG) + 2 * 2**20


def family(pid):
    """A process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def test_no_secret_is_in_argv_or_environment_of_any_process(hub, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "hf_access_token").write_text(TOKEN)
    hub.repos["org/name"].token = TOKEN
    hub.fault("/files/*", times=-1, bytes_per_second=2_000_000)
    spec = {"repoId": "org/name", "endpoint": hub.url, "secretRef": {"name": "hf"}}
    process = start("fetch", "--volume", tmp_path / "v", "--name", "m", "--secrets", secrets, spec=spec)
    try:
        wait_for(lambda: hub.ledger.bytes_sent("/files/*") > 0)
        for pid in family(process.pid):
            for name in ("cmdline", "environ"):
                assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    finally:
        process.kill()
        out, err = process.communicate()
    assert TOKEN not in out + err


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
