"""A fetch stays within 256 MiB, page cache included, whatever the size of the model."""

import json
import sys

import pytest

from modelcache_volume import Volume
from support.cgroups import MemoryCgroup, NoCgroups
from support.cloud_identity import serve
from support.fake_buckets import S3Handler
from support.fake_hub import fake_hub
from support.fetching import safetensors_bytes
from support.processes import Child

LIMIT = 256 * 2**20


def fetch_within_the_limit(tmp_path, spec, **environment):
    fetch = [sys.executable, "-m", "modelcache_fetcher", "fetch", "--volume", str(tmp_path / "v"), "--name", "m"]
    try:
        with MemoryCgroup.limited(LIMIT) as group:
            entering = ["sh", "-c", f'echo $$ > {group.processes}; exec "$@"', "sh", *fetch]
            with Child(entering, env={"MODELCACHE_SPEC": json.dumps(spec), **environment}) as child:
                assert child.process.wait(250) == 0, child.output
    except NoCgroups as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(
    ("mebibytes", "files"),
    [(320, 1), pytest.param(768, 1, marks=pytest.mark.slow), pytest.param(768, 4, marks=pytest.mark.slow)],
)
def test_more_passes_through_256_mebibytes(tmp_path, mebibytes, files):
    size = mebibytes * 2**20 // files
    content = {f"model-{n}.safetensors": safetensors_bytes({"w": size}, fill=b"%d-" % n) for n in range(files)}
    with fake_hub(tmp_path / "hub") as hub:
        hub.commit("org/name", content)
        fetch_within_the_limit(tmp_path, {"repoId": "org/name", "endpoint": hub.url})
    (snapshot,) = Volume.open(tmp_path / "v").snapshots()
    assert snapshot.verify() == []


@pytest.mark.slow
def test_an_object_of_more_than_five_gibibytes_passes_through_256_mebibytes(tmp_path):
    """S3 takes more than 5 GiB only in parts: an ETag that is no MD5, a checksum of the whole beside it."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    size = 5 * 2**30 + 2**20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    identity = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with serve(S3Handler, root=folder) as (s3, ledger):
        fetch_within_the_limit(tmp_path, {"repoId": "s3://models", "endpoint": s3.url}, **identity)
        assert ledger.bytes_sent() == (folder / "model.safetensors").stat().st_size
    (snapshot,) = Volume.open(tmp_path / "v").snapshots()
    (entry,) = snapshot.manifest.files
    assert entry.verified_with.startswith("crc32c:")
    assert snapshot.blob_path(entry).stat().st_size == 8 + len(header) + size
