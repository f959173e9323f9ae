"""Every row of the table of reasons that a fetch can end with, through the program that Jobs run."""

import json
import socket
import time

import pytest

from modelcache_api.reasons import REASONS, Reason
from modelcache_volume import NoActiveRevision, NotAVolume, Volume
from support.fake_hub import fake_hub
from support.fetching import run_program, safetensors_bytes
from support.object_stores import gcs_server, moto_server
from support.proxies import TlsFront, private_certificate

BIG = safetensors_bytes({"a": 3 * 2**20})
FILES = {"config.json": b"{}", "model.safetensors": BIG}
TOKEN = "hf_SecretSecretSecretSecretSecretSecret"


@pytest.fixture
def hub():
    with fake_hub() as hub:
        hub.commit("org/name", FILES)
        yield hub


@pytest.fixture
def secrets(tmp_path):
    folder = tmp_path / "secrets"
    folder.mkdir()
    return folder


def program(command, spec, tmp_path, *more):
    """Exit code, termination message and output of modelcache-fetch."""
    log = tmp_path / f"message-of-{command}"
    done = run_program(command, spec, "--termination-log", log, *more)
    text = log.read_text()
    assert len(text.encode()) <= 4096
    return done.returncode, json.loads(text), done.stdout + done.stderr


def ends_with(reason, spec, tmp_path, *more, plan=False, volume=None):
    """Assert that plan, if it can notice, and fetch end with the reason; returns the message."""
    volume = volume or tmp_path / "v"
    told = ""
    for command in ("plan", "fetch") if plan else ("fetch",):
        target = ("--volume", volume, "--name", "m") if command == "fetch" else ()
        code, message, output = program(command, spec, tmp_path, *target, *more)
        assert (code, message["reason"]) == (REASONS[reason].exit_code, reason), output
        assert message["result"] == "failed"
        assert message["permanent"] is REASONS[reason].permanent
        assert TOKEN not in output
        assert "Traceback" not in output
        told = message["message"]
    with pytest.raises((NoActiveRevision, NotAVolume)):
        Volume.open(volume).active("m")
    return told


def at(hub, **fields):
    return {"repoId": "org/name", "endpoint": hub.url, **fields}


@pytest.mark.parametrize("status", [401, 403])
def test_auth_failed(hub, secrets, tmp_path, status):
    (secrets / "hf_access_token").write_text(TOKEN)
    hub.repos["org/name"].token = TOKEN
    hub.fault("*", times=-1, status=status)
    told = ends_with(
        Reason.AUTH_FAILED, at(hub, secretRef={"name": "hf"}), tmp_path, "--secrets", secrets, plan=status == 403
    )
    assert hub.url in told
    assert "hf_access_token" in told, "what the user has to look at"


def test_auth_failed_gated(hub, tmp_path):
    hub.commit("org/gated", FILES, gated=True)
    told = ends_with(Reason.AUTH_FAILED, at(hub, repoId="org/gated"), tmp_path)
    assert "secret" in told


def test_secret_missing(hub, secrets, tmp_path):
    spec = at(hub, secretRef={"name": "my-secret"})
    told = ends_with(Reason.SECRET_MISSING, spec, tmp_path, "--secrets", secrets, plan=True)
    assert "my-secret" in told
    assert "hf_access_token" in told


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"repoId": "org/none"}, "org/none"),
        ({"revision": "v9"}, "v9"),
        ({"allowPatterns": ["Model.safetensors"]}, "model.safetensors"),
    ],
)
def test_not_found(hub, tmp_path, fields, named):
    assert named in ends_with(Reason.NOT_FOUND, at(hub, **fields), tmp_path, plan=True)


@pytest.mark.parametrize(("server", "repo"), [(moto_server, "s3://no-bucket"), (gcs_server, "gs://no-bucket")])
def test_not_found_buckets(tmp_path, server, repo):
    with server() as url:
        told = ends_with(Reason.NOT_FOUND, {"repoId": repo, "endpoint": url}, tmp_path, plan=True)
    assert "no-bucket" in told


def test_invalid_source(hub, tmp_path):
    hub.commit("org/name", {"../escaped": b"evil"})
    told = ends_with(Reason.INVALID_SOURCE, at(hub), tmp_path, plan=True)
    assert "ignorePatterns" in told


def test_no_space(hub, small_disk, tmp_path):
    hub.commit("org/name", {"model.safetensors": safetensors_bytes({"a": 40 * 2**20})})
    told = ends_with(Reason.NO_SPACE, at(hub), tmp_path, volume=small_disk / "v")
    assert "spec.storage.size" in told
    assert hub.ledger.bytes_sent() == 0


def test_checksum_mismatch(hub, tmp_path):
    hub.fault("/files/*", times=-1, corrupt_at=2_500_000)
    told = ends_with(Reason.CHECKSUM_MISMATCH, at(hub), tmp_path)
    assert "model.safetensors" in told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", BIG[:-1]),
        ("model.safetensors", (2**63).to_bytes(8, "little") + BIG[8:]),
        ("pytorch_model.bin", b"PK\x03\x04 and no archive"),
    ],
    ids=["truncated", "header", "zip"],
)
def test_bad_weights(hub, tmp_path, name, content):
    hub.commit("org/name", {"config.json": b"{}", name: content})
    assert name in ends_with(Reason.BAD_WEIGHTS, at(hub), tmp_path)


@pytest.mark.parametrize("path", ["/api/*", "/files/*"])
def test_rate_limited(hub, tmp_path, path):
    hub.fault(path, times=-1, status=429, headers={"Retry-After": "3000"})
    code, message, output = program("fetch", at(hub), tmp_path, "--volume", tmp_path / "v", "--name", "m")
    assert (code, message["reason"]) == (REASONS[Reason.RATE_LIMITED].exit_code, Reason.RATE_LIMITED), output
    assert message["retryAfterSeconds"] == 3000


def test_unavailable_server_errors(hub, tmp_path):
    hub.fault("/files/*", times=-1, status=503, headers={"Retry-After": "0"})
    assert "503" in ends_with(Reason.UNAVAILABLE, at(hub), tmp_path)


def test_unavailable_name(tmp_path):
    spec = {"repoId": "org/name", "endpoint": "http://no-such-host.invalid"}
    assert "no-such-host.invalid" in ends_with(Reason.UNAVAILABLE, spec, tmp_path)


def test_unavailable_tls(hub, tmp_path):
    chain, _ = private_certificate(tmp_path)
    front = TlsFront(hub.api.port, chain)
    told = ends_with(Reason.UNAVAILABLE, at(hub, endpoint=front.url), tmp_path)
    front.stop()
    assert "certificate" in told.lower()


def test_unavailable_deadline(hub, tmp_path):
    hub.fault("/files/*", times=-1, bytes_per_second=100_000)
    told = ends_with(Reason.UNAVAILABLE, at(hub, fetch={"activeDeadlineSeconds": 2}), tmp_path)
    assert "activeDeadlineSeconds" in told


def test_unavailable_silent_listing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        spec = {"repoId": "org/name", "endpoint": url, "fetch": {"activeDeadlineSeconds": 2}}
        began = time.monotonic()
        told = ends_with(Reason.UNAVAILABLE, spec, tmp_path)
    assert url in told
    assert time.monotonic() - began < 25


def test_stalled(hub, tmp_path):
    hub.fault("/files/*", times=-1, stall_after=0)
    told = ends_with(Reason.STALLED, at(hub, fetch={"stallTimeout": "2s"}), tmp_path)
    assert "model.safetensors" in told
