"""Fetching from a hub that speaks the Hugging Face Hub's HTTP API, in all its moods."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, Progress, make_plan, run_fetch
from modelcache_fetcher.retry import Limits
from modelcache_volume import NoActiveRevision, Volume
from support.fake_hub import fake_hub
from support.fetching import IMPATIENT, contents, options, safetensors_bytes, spec

REPO = "org/name"
TOKEN = "hf_SecretSecretSecretSecretSecretSecret"
BIG = safetensors_bytes({"a": 17 * 2**20, "b": 3 * 2**20 + 5})
FILES = {
    "README.md": b"# Model\n",
    "config.json": b'{"model_type": "bert"}',
    "empty.txt": b"",
    "model.safetensors": BIG,
    "sub/tokenizer.json": b"[" + b"1," * 600_000 + b"1]",
}


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def commit(hub):
    return hub.commit(REPO, FILES)


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


def fetch(hub, volume, *, limits=IMPATIENT, secrets_dir=None, progress=None, repo=REPO, **fields):
    given = options(limits=limits, secrets_dir=secrets_dir)
    return run_fetch(spec(repo, endpoint=hub.url, **fields), volume, "model", options=given, progress=progress)


def fails(hub, volume, **arguments):
    with pytest.raises(FetchError) as caught:
        fetch(hub, volume, **arguments)
    if volume.exists():
        with pytest.raises(NoActiveRevision):
            Volume.open(volume).active("model")
        assert Volume.open(volume).snapshots() == []
    assert TOKEN not in str(caught.value)
    return caught.value


# What is published


def test_what_is_published_is_what_the_repo_has(hub, commit, volume):
    progress = Progress()
    result = fetch(hub, volume, progress=progress)
    assert contents(volume, "model") == FILES
    assert (result.commit, result.files, result.generation) == (commit, len(FILES), 1)
    assert result.bytes == result.downloaded_bytes == sum(map(len, FILES.values())) == hub.ledger.bytes_sent()
    snapshot = Volume.open(volume).snapshot(result.digest)
    assert snapshot.verify() == []
    assert [weights.path for weights in snapshot.manifest.weight_sets] == ["model.safetensors"]
    assert [tensor.name for tensor in snapshot.manifest.tensors] == ["a", "b"]
    shown = progress.snapshot()
    assert (shown["phase"], shown["bytes"], shown["files"]) == ("done", result.bytes, len(FILES))


def test_the_manifest_says_how_each_file_was_checked(hub, commit, volume):
    fetch(hub, volume)
    (snapshot,) = Volume.open(volume).snapshots()
    entries = {file.path: file for file in snapshot.manifest.files}
    stored = hub.repos[REPO].commits[commit]
    for path, entry in entries.items():
        assert entry.sha256.hex() == stored[path].sha256
        assert entry.git_oid == stored[path].git_oid
    assert entries["model.safetensors"].lfs_sha256 == stored["model.safetensors"].sha256
    assert entries["model.safetensors"].verified_with.startswith("sha256:")
    assert entries["config.json"].verified_with == f"git-blob-sha1:{stored['config.json'].git_oid}"


def test_huggingface_hub_reads_the_volume_offline(hub, commit, volume):
    from huggingface_hub import hf_hub_download

    fetch(hub, volume)
    path = hf_hub_download(REPO, "sub/tokenizer.json", cache_dir=volume / "hub", local_files_only=True)
    assert Path(path).read_bytes() == FILES["sub/tokenizer.json"]


def test_branches_tags_full_and_short_commits_are_resolved(hub, commit, volume):
    other = hub.commit(REPO, {"config.json": b"other"}, branch="feature/x")
    hub.repos[REPO].tags["v1.0"] = commit
    for revision, expected in [("main", commit), ("feature/x", other), ("v1.0", commit), (other, other)]:
        assert make_plan(spec(REPO, endpoint=hub.url, revision=revision)).commit == expected
    assert make_plan(spec(REPO, endpoint=hub.url, revision=other[:8])).commit == other
    fetch(hub, volume, revision=other[:8])
    active = Volume.open(volume).active("model")
    assert (active.requested, active.commit) == (other[:8], other)


def test_patterns_choose_files_across_folders(hub, commit, volume):
    fetch(hub, volume, allow_patterns=["*.json"], ignore_patterns=["sub/*"])
    assert sorted(contents(volume, "model")) == ["config.json"]


def test_a_listing_of_several_pages_is_read_whole(volume):
    files = {f"f{number:03}.txt": str(number).encode() for number in range(23)}
    with fake_hub(page_size=5) as hub:
        hub.commit(REPO, files)
        fetch(hub, volume)
    assert contents(volume, "model") == files


def test_names_that_need_quoting_arrive(hub, volume):
    files = {"a b/c%20d?#.txt": b"1", "ü/é+&=.json": b"2", "w'\"().safetensors": safetensors_bytes({"x": 9})}
    hub.commit(REPO, files)
    fetch(hub, volume)
    assert contents(volume, "model") == files


# Once is enough


def test_nothing_changed_means_nothing_is_downloaded(hub, commit, volume):
    first = fetch(hub, volume)
    hub.ledger.reset()
    second = fetch(hub, volume)
    assert hub.ledger.bytes_sent() == 0
    assert (second.digest, second.generation, second.downloaded_bytes) == (first.digest, 1, 0)


def test_a_new_revision_moves_only_what_changed(hub, commit, volume):
    fetch(hub, volume)
    hub.ledger.reset()
    hub.commit(REPO, {**FILES, "config.json": b"{}", "copy.safetensors": BIG})
    result = fetch(hub, volume)
    assert hub.ledger.bytes_sent() == result.downloaded_bytes == 2
    assert contents(volume, "model") == {**FILES, "config.json": b"{}", "copy.safetensors": BIG}
    (active,) = Volume.open(volume).actives()
    snapshot = Volume.open(volume).snapshot(active.digest)
    assert [tensor.name for tensor in snapshot.manifest.tensors] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("size", [20 * 2**20, pytest.param(2 * 10**9, marks=pytest.mark.slow)], ids=["20 MiB", "2 GB"])
def test_of_ten_files_the_one_that_changed_is_moved(hub, volume, tmp_path, size):
    def shard(number, fill):
        path = tmp_path / f"{number}-{fill}"
        header = safetensors_bytes({f"t{number}": size // 10})[: -(size // 10)]
        with path.open("wb") as file:
            file.write(header + fill.to_bytes(4, "little"))
            file.truncate(len(header) + size // 10)
        return path

    files = {f"model-{number}.safetensors": shard(number, 1) for number in range(10)}
    hub.commit(REPO, files)
    fetch(hub, volume)
    assert hub.ledger.bytes_sent() == sum(path.stat().st_size for path in files.values())
    hub.ledger.reset()
    changed = shard(7, 2)
    hub.commit(REPO, {**files, "model-7.safetensors": changed})
    result = fetch(hub, volume)
    assert hub.ledger.bytes_sent() == result.downloaded_bytes == changed.stat().st_size
    assert {seen.path for seen in hub.file_requests()} == {f"/files/{REPO}/model-7.safetensors"}
    assert result.bytes >= size
    assert Volume.open(volume).snapshot(result.digest).verify() == []


def test_going_back_to_a_kept_revision_downloads_nothing(hub, commit, volume):
    first = fetch(hub, volume)
    hub.commit(REPO, {**FILES, "config.json": b"{}"})
    fetch(hub, volume)
    hub.ledger.reset()
    back = fetch(hub, volume, revision=commit)
    assert hub.ledger.bytes_sent() == 0
    assert (back.digest, back.generation) == (first.digest, 3)


def test_history_beyond_the_limit_is_removed(hub, volume):
    for number in range(4):
        hub.commit(REPO, {"config.json": str(number).encode()})
        fetch(hub, volume, revision_history_limit=1)
    assert len(Volume.open(volume).snapshots()) == 2
    assert len(list((volume / "hub" / "models--org--name" / "blobs").iterdir())) == 2


def test_a_damaged_blob_is_noticed_by_its_size_and_fetched_again(hub, commit, volume):
    result = fetch(hub, volume)
    snapshot = Volume.open(volume).snapshot(result.digest)
    blob = snapshot.blob_path(snapshot.file("config.json"))
    blob.write_bytes(b"short")
    fetch(hub, volume)
    assert contents(volume, "model") == FILES


# Faults on the way


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503, "headers": {"Retry-After": "0"}},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 403},
        {"cut_after": 0},
        {"cut_after": 3_000_001},
        {"corrupt_at": 12},
        {"corrupt_at": 5_000_000},
        {"ignore_range": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("times", [1, 3])
def test_passing_faults_of_the_file_host_are_healed(hub, commit, volume, fault, times):
    hub.fault("/files/*", times=1 if "corrupt_at" in fault else times, **fault)
    fetch(hub, volume)
    assert contents(volume, "model") == FILES


@pytest.mark.parametrize("path", ["*/resolve/*", "/api/*"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_faults_of_the_hub_are_healed(hub, commit, volume, path, status):
    hub.fault(path, times=2, status=status, headers={"Retry-After": "0"})
    fetch(hub, volume)
    assert contents(volume, "model") == FILES


def test_a_cut_range_is_continued_where_it_broke(hub, commit, volume):
    hub.fault("/files/*", times=2, cut_after=7_000_000)
    fetch(hub, volume)
    assert hub.ledger.bytes_sent("/files/*") == len(BIG)


def test_a_server_without_ranges_is_read_in_one_piece(hub, commit, volume):
    hub.fault("/files/*", times=-1, ignore_range=True)
    fetch(hub, volume)
    assert contents(volume, "model") == FILES


def test_retry_after_is_waited_for(hub, commit, volume):
    hub.fault("/files/*", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    fetch(hub, volume)
    assert time.monotonic() - began >= 1
    assert contents(volume, "model") == FILES


def test_a_stalled_connection_is_given_up_and_the_range_continued(hub, commit, volume):
    hub.fault("/files/*", stall_after=1_500_000)
    limits = Limits(read_timeout=0.3, stall_timeout=20, backoff=0.01)
    fetch(hub, volume, limits=limits)
    assert contents(volume, "model") == FILES
    assert hub.ledger.bytes_sent("/files/*") == len(BIG)


def test_expired_signatures_are_renewed(volume):
    with fake_hub(url_lifetime=0.05) as hub:
        hub.commit(REPO, FILES)
        hub.fault("/files/*", times=-1, delay=0.06)
        with pytest.raises(FetchError):
            fetch(hub, volume, limits=Limits(attempts=3, backoff=0.01))
        hub.url_lifetime = 0.5
        hub.ledger.clear_faults()
        hub.fault("/files/*", times=-1, bytes_per_second=40_000_000)
        fetch(hub, volume, fetch={"concurrency": 1})
    assert contents(volume, "model") == FILES


# Faults that stay


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 500}, Reason.UNAVAILABLE),
        ({"cut_after": 0}, Reason.UNAVAILABLE),
        ({"status": 404}, Reason.UNAVAILABLE),
        ({"status": 429, "headers": {"Retry-After": "3"}}, Reason.RATE_LIMITED),
        ({"status": 429, "headers": {"Retry-After": "0"}}, Reason.RATE_LIMITED),
        ({"status": 503, "headers": {"Retry-After": "3600"}}, Reason.UNAVAILABLE),
        ({"corrupt_at": 19_000_000}, Reason.CHECKSUM_MISMATCH),
        ({"status": 451}, Reason.INVALID_SOURCE),
    ],
    ids=str,
)
def test_lasting_faults_of_the_file_host_end_with_their_reason(hub, commit, volume, fault, reason):
    hub.fault("/files/*", times=-1, **fault)
    error = fails(hub, volume)
    assert error.reason is reason
    assert "model.safetensors" in str(error)
    assert "Signature" not in str(error)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("sha", {"sha": None}),
        ("sha", {"sha": "../elsewhere"}),
        ("size", {"size": "12"}),
        ("size", {"size": -1}),
        ("size", {"size": 2**63}),
        ("path", {"path": 7}),
        ("oid", {"oid": "zz"}),
        ("oid", {"oid": None}),
        ("lfs", {"lfs": {"oid": "abcd", "size": 5, "pointerSize": 130}}),
    ],
    ids=str,
)
def test_a_hub_whose_answers_make_no_sense_is_refused_as_a_source(hub, commit, volume, where, changes):
    def misanswer(value):
        if isinstance(value, list):
            return [entry | changes if where in entry else entry for entry in value]
        return value | changes if where in value and "siblings" in value else value

    hub.misanswer = misanswer
    error = fails(hub, volume)
    assert error.reason is Reason.INVALID_SOURCE
    assert "The hub answered" in str(error)


def test_no_byte_for_the_stall_timeout_is_stalled(hub, commit, volume):
    hub.fault("/files/*", times=-1, stall_after=0)
    error = fails(hub, volume, limits=Limits(read_timeout=0.2, stall_timeout=0.5, backoff=0.01))
    assert error.reason is Reason.STALLED


def test_the_deadline_ends_a_fetch(hub, commit, volume):
    hub.fault("/files/*", times=-1, bytes_per_second=100_000)
    began = time.monotonic()
    error = fails(hub, volume, limits=Limits(deadline_seconds=0.7))
    assert "deadline" in str(error)
    assert time.monotonic() - began < 5


def test_a_hub_that_is_not_there_is_unavailable(hub, commit, volume):
    hub.stop()
    error = fails(hub, volume, limits=Limits(attempts=2, backoff=0.01))
    assert error.reason is Reason.UNAVAILABLE
    assert hub.url in str(error)


def test_wrong_repo_revision_and_pattern_are_not_found(hub, commit, volume):
    assert fails(hub, volume, repo="org/other").reason is Reason.NOT_FOUND
    error = fails(hub, volume, revision="v9")
    assert error.reason is Reason.NOT_FOUND
    assert "'v9'" in str(error)
    error = fails(hub, volume, allow_patterns=["Model.safetensors"])
    assert error.reason is Reason.NOT_FOUND
    assert "model.safetensors" in str(error)


@pytest.mark.parametrize("damage", ["truncated", "offsets", "header"])
def test_malformed_weights_are_bad_weights(hub, volume, damage):
    content = {
        "truncated": BIG[:-1],
        "offsets": BIG.replace(b"[0,", b"[1,", 1),
        "header": (2**63 - 1).to_bytes(8, "little") + BIG[8:],
    }[damage]
    hub.commit(REPO, {"config.json": b"{}", "model.safetensors": content})
    error = fails(hub, volume)
    assert error.reason is Reason.BAD_WEIGHTS
    assert "model.safetensors" in str(error)


# Secrets


@pytest.fixture
def secrets(tmp_path):
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "hf_access_token").write_text(TOKEN + "\n")
    return folder


def test_a_private_repo_needs_its_token_which_follows_no_redirect(hub, volume, secrets):
    hub.commit(REPO, FILES, token=TOKEN)
    assert fails(hub, volume).reason is Reason.NOT_FOUND
    hub.ledger.reset()
    fetch(hub, volume, secrets_dir=secrets, secret_ref={"name": "hf"})
    assert contents(volume, "model") == FILES
    assert hub.file_requests()
    for seen in hub.ledger.requests:
        if seen.path.startswith("/files/"):
            assert "authorization" not in seen.headers
            assert TOKEN not in str(seen)
        else:
            assert seen.headers["authorization"] == f"Bearer {TOKEN}"


def test_a_gated_repo_is_auth_failed_until_access_is_granted(hub, volume, secrets):
    hub.commit(REPO, FILES, gated=True)
    error = fails(hub, volume)
    assert error.reason is Reason.AUTH_FAILED
    hub.repos[REPO].members.add(TOKEN)
    fetch(hub, volume, secrets_dir=secrets, secret_ref={"name": "hf"})
    assert contents(volume, "model") == FILES


def test_a_wrong_token_is_auth_failed(hub, commit, volume, secrets):
    (secrets / "hf_access_token").write_text("hf_wrong")
    error = fails(hub, volume, secrets_dir=secrets, secret_ref={"name": "hf"})
    assert error.reason is Reason.AUTH_FAILED
    assert "hf_wrong" not in str(error)


def test_a_missing_key_is_secret_missing(hub, commit, volume, secrets):
    (secrets / "hf_access_token").unlink()
    error = fails(hub, volume, secrets_dir=secrets, secret_ref={"name": "hf"})
    assert error.reason is Reason.SECRET_MISSING


def test_a_token_rotated_during_the_fetch_is_read_again(hub, volume, secrets):
    hub.commit(REPO, FILES, token="hf_old")
    (secrets / "hf_access_token").write_text("hf_old")

    def rotate():
        while not any("/resolve/" in seen.path for seen in hub.ledger.requests):
            time.sleep(0.005)
        hub.repos[REPO].token = "hf_new"
        (secrets / "hf_access_token").write_text("hf_new")

    hub.fault("*/resolve/*", times=-1, delay=0.1)
    rotation = threading.Thread(target=rotate)
    rotation.start()
    fetch(hub, volume, secrets_dir=secrets, secret_ref={"name": "hf"})
    rotation.join()
    assert contents(volume, "model") == FILES
    tokens = {seen.headers["authorization"] for seen in hub.ledger.requests if "/resolve/" in seen.path}
    assert tokens == {"Bearer hf_old", "Bearer hf_new"}


def test_the_machines_own_token_is_not_shown_to_another_endpoint(hub, commit, volume, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(hub, volume)
    assert all("authorization" not in seen.headers for seen in hub.ledger.requests)


# The volume


def test_no_space_is_refused_before_the_first_byte(hub, commit, volume, monkeypatch):
    real = os.statvfs

    def full(path):
        values = list(real(path))
        values[4] = 1000  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    error = fails(hub, volume)
    assert error.reason is Reason.NO_SPACE
    assert hub.ledger.bytes_sent() == 0


def test_a_second_fetcher_stops_with_a_clear_message(hub, commit, volume):
    with Volume.create(volume).lock():
        error = fails(hub, volume)
    assert error.reason is Reason.VOLUME_BUSY


def test_a_volume_of_a_newer_format_is_left_alone(hub, commit, volume):
    Volume.create(volume)
    (volume / "FORMAT").write_text("99\n")
    with pytest.raises(FetchError) as caught:
        fetch(hub, volume)
    assert caught.value.reason is Reason.NEWER_FORMAT


def test_a_folder_with_other_things_is_no_volume(hub, commit, volume):
    volume.mkdir()
    (volume / "precious.txt").write_text("x")
    with pytest.raises(FetchError) as caught:
        fetch(hub, volume)
    assert caught.value.reason is Reason.NOT_A_VOLUME
    assert [path.name for path in volume.iterdir()] == ["precious.txt"]


def test_a_failing_new_revision_leaves_the_old_one_active(hub, commit, volume):
    before = fetch(hub, volume)
    hub.commit(REPO, {**FILES, "model.safetensors": BIG[:-1]})
    with pytest.raises(FetchError):
        fetch(hub, volume)
    assert Volume.open(volume).active("model").digest == before.digest
    assert contents(volume, "model") == FILES


def test_an_interrupted_fetch_is_continued_not_repeated(hub, commit, volume):
    hub.fault("/files/*", times=-1, status=500, skip=1)
    with pytest.raises(FetchError):
        fetch(hub, volume, fetch={"concurrency": 1})
    sent = hub.ledger.bytes_sent("/files/*")
    assert 0 < sent < len(BIG)
    hub.ledger.clear_faults()
    fetch(hub, volume)
    assert hub.ledger.bytes_sent("/files/*") == len(BIG)
    assert contents(volume, "model") == FILES


@pytest.mark.parametrize("offset", [0, 1_500_000, 9_000_000])
def test_kept_bytes_that_changed_on_disk_are_fetched_again(hub, commit, volume, offset):
    hub.fault("/files/*", times=-1, status=500, skip=1)
    with pytest.raises(FetchError):
        fetch(hub, volume, fetch={"concurrency": 1})
    (part,) = (p for p in volume.glob("hub/*/incoming/*.part") if ".log." not in p.name and p.stat().st_size > 2**20)
    with part.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x00\xff")
    hub.ledger.clear_faults()
    fetch(hub, volume)
    assert contents(volume, "model") == FILES
    assert hub.ledger.bytes_sent("/files/*") <= len(BIG) + 2 * 2**20


def test_partial_files_are_gone_after_success(hub, commit, volume):
    fetch(hub, volume)
    assert list(volume.glob("hub/*/incoming/*")) == []


def test_the_plan_shows_every_file_with_its_reason(hub, commit):
    plan = make_plan(spec(REPO, endpoint=hub.url, ignore_patterns=["*.md"]), options())
    shown = json.loads(json.dumps(plan.to_json()))
    assert shown["commit"] == commit
    assert shown["totalBytes"] == sum(len(data) for path, data in FILES.items() if path != "README.md")
    assert [file["path"] for file in shown["skipped"]] == ["README.md"]
    assert hub.ledger.bytes_sent() == 0
