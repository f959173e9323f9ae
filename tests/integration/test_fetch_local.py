"""Fetching from folders of this machine."""

import os

import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, run_fetch, transport
from modelcache_volume import Volume
from modelcache_volume.v1 import manifest_pb2
from support.fetching import contents, options, safetensors_bytes, spec

BIG = safetensors_bytes({"a": 17 * 2**20 + 3})
FILES = {"config.json": b"{}", "model.safetensors": BIG, "sub/vocab.txt": b"a\n"}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "source"
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "volume"


def fetch(folder, volume, **fields):
    return run_fetch(spec(f"file://{folder}", **fields), volume, "model", options=options())


def test_a_file_replaced_by_another_of_its_size_and_time_is_noticed(folder, volume):
    fetch(folder, volume)
    path = folder / "model.safetensors"
    before = path.stat()
    changed = safetensors_bytes({"b": 17 * 2**20 + 3})
    (folder.parent / "new").write_bytes(changed)
    os.utime(folder.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder.parent / "new").replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    fetch(folder, volume)
    assert contents(volume, "model")["model.safetensors"] == changed


def test_an_index_too_large_for_a_fetchs_memory_is_refused(folder, volume):
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(FetchError, match=r"model\.safetensors\.index\.json has 16\.0 MiB") as caught:
        fetch(folder, volume)
    assert caught.value.reason is Reason.BAD_WEIGHTS


def test_a_folder_is_copied_verified_and_linked(folder, volume):
    result = fetch(folder, volume)
    assert contents(volume, "model") == FILES
    snapshot = Volume.open(volume).snapshot(result.digest)
    assert {file.verification for file in snapshot.manifest.files} == {manifest_pb2.VERIFICATION_LOCAL_STAT}
    assert (volume / "model_cache" / "source" / "config.json").read_bytes() == b"{}"


def test_nothing_changed_means_nothing_is_read(folder, volume):
    first = fetch(folder, volume)
    second = fetch(folder, volume)
    assert (second.digest, second.downloaded_bytes, second.generation) == (first.digest, 0, 1)


def test_a_changed_file_alone_is_read_again(folder, volume):
    fetch(folder, volume)
    (folder / "config.json").write_bytes(b"[1]")
    assert fetch(folder, volume).downloaded_bytes == 3
    assert contents(volume, "model") == {**FILES, "config.json": b"[1]"}


def test_a_volumes_own_hugging_face_cache_is_a_source(folder, volume, tmp_path):
    fetch(folder, volume)
    (cached,) = (volume / "hub").iterdir()
    second = tmp_path / "second"
    fetch(cached, second)
    assert contents(second, "model") == FILES


def change_while_reading(monkeypatch, change, times):
    """Call ``change`` after the first read of the large file, in so many fetches."""
    real, left = transport.LocalBody.read_into, [times]

    def read_into(body, buffer):
        count = real(body, buffer)
        if body._name == "model.safetensors" and left[0]:
            left[0] -= 1
            change()
        return count

    monkeypatch.setattr(transport.LocalBody, "read_into", read_into)


def test_a_file_that_changes_while_it_is_read_is_planned_anew(folder, volume, monkeypatch):
    new = safetensors_bytes({"a": 17 * 2**20 + 3}, fill=b"new")
    change_while_reading(monkeypatch, lambda: (folder / "model.safetensors").write_bytes(new), 1)
    fetch(folder, volume)
    assert contents(volume, "model") == {**FILES, "model.safetensors": new}


def test_a_file_that_never_rests_is_an_error(folder, volume, monkeypatch):
    counter = iter(range(1, 10_000))

    def touch():
        os.utime(folder / "model.safetensors", ns=(next(counter), next(counter)))

    change_while_reading(monkeypatch, touch, -1)
    with pytest.raises(FetchError, match="at rest") as caught:
        fetch(folder, volume)
    assert caught.value.reason is Reason.UNAVAILABLE
    assert Volume.open(volume).snapshots() == []


def test_a_file_that_is_swapped_for_a_link_after_the_plan_is_not_followed(folder, volume, monkeypatch, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(BIG)

    def swap():
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(secret)

    change_while_reading(monkeypatch, swap, 1)
    with pytest.raises(FetchError) as caught:
        fetch(folder, volume, fetch={"concurrency": 1})
    assert caught.value.reason is Reason.INVALID_SOURCE


@pytest.mark.parametrize("damage", ["truncated", "flipped header"])
def test_malformed_weights_are_bad_weights(folder, volume, damage):
    content = BIG[:-1] if damage == "truncated" else b"\x00" + BIG[1:]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FetchError, match=r"model\.safetensors") as caught:
        fetch(folder, volume)
    assert caught.value.reason is Reason.BAD_WEIGHTS
