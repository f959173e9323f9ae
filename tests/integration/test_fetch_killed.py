"""kill -9 at any moment, then again until done: what is published is whole, and little is fetched twice."""

import multiprocessing
import random
from pathlib import Path

import pytest

from modelcache_fetcher import run_fetch
from modelcache_volume import Volume
from support.fake_hub import fake_hub
from support.fetching import contents, options, safetensors_bytes, spec

# A server of forks starts each victim within milliseconds, its modules loaded.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["support.fetching", "modelcache_fetcher.sources.huggingface", "support.victims"])


def kill_until_done(hub, volume, files, moments, **fields):
    """Start a fetch for each moment (seconds) and kill it then; afterwards let one finish."""
    from support.victims import fetch_model

    expected = dict(files)
    for moment in moments:
        victim = FORKS.Process(target=fetch_model, args=(hub.url, str(volume), fields))
        victim.start()
        victim.join(moment)
        victim.kill()
        victim.join()
        victim.close()
        if (volume / "FORMAT").exists():
            for snapshot in Volume.open(volume).snapshots():
                assert {file.path for file in snapshot.manifest.files} == set(expected)
                assert snapshot.verify() == []
    result = run_fetch(spec("org/name", endpoint=hub.url, **fields), volume, "model", options=options())
    assert Volume.open(volume).snapshot(result.digest).verify() == []
    assert contents(volume, "model") == expected
    assert list(Path(volume).glob("hub/*/incoming/*")) == []


def repo(megabytes):
    files = {f"model-{n:05}-of-00003.safetensors": safetensors_bytes({f"t{n}": megabytes * 2**20}) for n in (1, 2, 3)}
    return {**files, "config.json": b"{}", "tokenizer.json": b"[]" * 100_000}


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_little_is_fetched_twice(tmp_path, kills):
    files = repo(60 if kills > 10 else 8)
    size = sum(map(len, files.values()))
    with fake_hub() as hub:
        hub.commit("org/name", files)
        hub.fault("/files/*", times=-1, bytes_per_second=500_000)
        generator = random.Random(kills)
        moments = [generator.uniform(0.0, 1.0) for _ in range(kills)]
        kill_until_done(hub, tmp_path / "v", files, moments, fetch={"concurrency": 16})
        print(f"{hub.ledger.bytes_sent() / size:.3f} times the size was sent over {kills} kills")
        assert hub.ledger.bytes_sent() <= 1.2 * size


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_kill_while_publishing_leaves_the_old_state_or_the_new_one(tmp_path, kills):
    files = repo(2)
    generator = random.Random(kills)
    with fake_hub() as hub:
        hub.commit("org/name", files)
        kill_until_done(hub, tmp_path / "v", files, [generator.uniform(0.0, 0.4) for _ in range(kills)])
