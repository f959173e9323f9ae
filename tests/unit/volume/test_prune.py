import time

import pytest

from modelcache_volume import LEASE_SECONDS, CorruptBlob, NewerFormat, Volume
from modelcache_volume.prune import INCOMING_SECONDS, FolderState, decide, protected
from modelcache_volume.records import encode_record
from modelcache_volume.v1 import manifest_pb2
from support.volumes import manifest_of, publish

FOLDER = "models--org--name"
NOW = 1_800_000_000.0


@pytest.fixture
def volume(tmp_path):
    return Volume.create(tmp_path / "volume")


def state(*manifests, **more):
    by_digest = {manifest.digest: manifest for manifest in manifests}
    blobs = {file.sha256.hex(): NOW for manifest in manifests for file in manifest.files}
    return FolderState(FOLDER, by_digest, blobs={**blobs, **more.pop("extra_blobs", {})}, **more)


def active(manifest, *history, limit=1):
    return manifest_pb2.Active(
        folder=FOLDER,
        digest=manifest.digest,
        commit=manifest.source.commit,
        history_limit=limit,
        history=[manifest_pb2.Previous(folder=FOLDER, digest=old.digest, commit=old.source.commit) for old in history],
    )


def names(manifest):
    return {file.sha256.hex() for file in manifest.files}


ONE = manifest_of({"a": b"shared", "b": b"1"}, commit="1" * 40)
TWO = manifest_of({"a": b"shared", "b": b"2"}, commit="2" * 40)
THREE = manifest_of({"a": b"shared", "b": b"3"}, commit="3" * 40)


def test_active_and_its_history_up_to_the_limit_stay_and_shared_blobs_with_them():
    removal = decide(state(ONE, TWO, THREE), protected([active(THREE, TWO, ONE)], ()), NOW)
    assert removal.manifests == (ONE.digest,)
    assert set(removal.blobs) == names(ONE) - names(TWO)


def test_leased_and_named_digests_stay():
    removal = decide(state(ONE, TWO, THREE), protected([active(THREE)], {ONE.digest}), NOW)
    assert removal.manifests == (TWO.digest,)


def test_an_active_of_another_source_protects_nothing_here():
    other = active(ONE)
    other.folder = "models--other--name"
    assert decide(state(ONE), protected([other], ()), NOW).manifests == (ONE.digest,)


def test_what_an_interrupted_fetch_left_stays_for_a_week():
    left = {"f" * 64: NOW - INCOMING_SECONDS + 60, "e" * 64: NOW - INCOMING_SECONDS - 60}
    removal = decide(state(incoming={"young": NOW - 60, "old": NOW - 10**6}, extra_blobs=left), protected([], ()), NOW)
    assert removal.incoming == ("old",)
    assert removal.blobs == ("e" * 64,)


def test_a_caller_who_knows_what_is_wanted_clears_the_rest_at_once():
    found = state(incoming={"wanted": NOW - 10**7, "other": NOW}, extra_blobs={"f" * 64: NOW, "e" * 64: NOW})
    removal = decide(found, protected([], ()), NOW, in_use={"f" * 64}, keep_incoming={"wanted"})
    assert removal.incoming == ("other",)
    assert removal.blobs == ("e" * 64,)


def test_a_removal_that_was_interrupted_is_finished():
    left = dict.fromkeys(names(ONE), NOW)
    removal = decide(state(TWO, pruned={ONE.digest: ONE}, extra_blobs=left), protected([active(TWO)], ()), NOW)
    assert set(removal.blobs) == names(ONE) - names(TWO)
    assert removal.pruned == (ONE.digest,)
    assert removal.manifests == ()


def test_blobs_that_the_running_fetch_relies_on_stay_and_are_remembered():
    spared = next(iter(names(ONE) - names(TWO)))
    removal = decide(state(ONE, TWO), protected([active(TWO)], ()), NOW, in_use={spared})
    assert removal.blobs == ()
    assert removal.pruned == ()
    assert removal.manifests == (ONE.digest,)


def test_commits_and_refs_stay_while_something_names_them():
    twice = manifest_pb2.Manifest()
    twice.CopyFrom(TWO)
    for commit in ("0" * 40, "8" * 40, "9" * 40, "2" * 40):
        twice.revisions.add(commit=commit)
    now = active(twice)
    now.commit = "9" * 40
    found = state(
        twice,
        refs={"main": "2" * 40, "v1": "8" * 40, "gone": "7" * 40},
        commits=["0" * 40, "2" * 40, "7" * 40, "8" * 40, "9" * 40],
    )
    removal = decide(found, protected([now], ()), NOW)
    assert removal.commits == ("0" * 40, "7" * 40)
    assert removal.refs == ("gone",)


def test_pruning_removes_old_snapshots_whole_and_leaves_the_rest_whole(volume):
    with volume.lock() as writer:
        snapshots = [
            publish(
                writer, {"same": b"s" * 1000, f"sub{n}/own": b"x" * (100 + n)}, commit=str(n) * 40, requested=f"v{n}"
            )
            for n in range(4)
        ]
        for snapshot in snapshots[1:]:
            writer.activate("bert", snapshot, requested="main")
    with volume.lock() as writer:
        pruned = writer.prune()
        assert writer.prune().digests == ()
    assert set(pruned.digests) == {snapshots[0].digest, snapshots[1].digest}
    assert pruned.bytes == 100 + 101
    assert {snapshot.digest for snapshot in volume.snapshots()} == {snapshot.digest for snapshot in snapshots[2:]}
    assert all(snapshot.verify() == [] for snapshot in volume.snapshots())
    assert sorted(path.name for path in volume.layout.snapshots(FOLDER).iterdir()) == ["2" * 40, "3" * 40]
    assert sorted(path.name for path in volume.layout.refs(FOLDER).iterdir()) == ["main", "v2", "v3"]
    assert len(list(volume.layout.manifests(FOLDER).iterdir())) == 2


def test_one_commit_with_two_selections_keeps_the_links_of_the_kept_one(volume):
    with volume.lock() as writer:
        publish(writer, {"a": b"1", "deep/er/b": b"2"})
        kept = publish(writer, {"a": b"1"})
        writer.activate("bert", kept, requested="main")
        writer.prune()
    assert [str(p.relative_to(kept.commit_folder())) for p in kept.commit_folder().rglob("*")] == ["a"]


def test_a_source_that_nobody_needs_leaves_nothing_behind(volume):
    with volume.lock() as writer:
        publish(writer, {"a": b"1", "x/y": b"2"}, repo_id="s3://bucket/a", requested="")
        publish(writer, {"a": b"1", "x/y": b"2"}, requested="refs/pr/1")
    with volume.lock() as writer:
        writer.prune()
    assert list(volume.layout.hub.iterdir()) == []


def test_a_leased_snapshot_stays_until_its_lease_ends(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, {"a": b"1"})
        volume.renew_lease(snapshot.digest, "pod")
        assert writer.prune().digests == ()
        assert writer.prune(now=time.time() + LEASE_SECONDS + 5).digests == (snapshot.digest,)
    assert list(volume.layout.leases.iterdir()) == []


def test_parts_of_an_interrupted_fetch_go_only_when_asked_or_old(volume):
    with volume.lock() as writer:
        for key in ("one", "two"):
            writer.incoming(FOLDER, key).write_bytes(b"12345")
        (volume.layout.incoming(FOLDER) / "one.ranges").write_bytes(b"x")
    with volume.lock() as writer:
        assert writer.prune().bytes == 0
        assert writer.prune(keep_incoming={"models--other--name": set()}).bytes == 0
        assert writer.prune(keep_incoming={FOLDER: {"two"}}).bytes == 6
        assert [path.name for path in volume.layout.incoming(FOLDER).iterdir()] == ["two.part"]
        assert writer.prune(now=time.time() + INCOMING_SECONDS + 60).bytes == 5


def test_a_fetch_that_makes_room_keeps_what_it_has_already(volume):
    with volume.lock() as writer:
        part = writer.incoming(FOLDER, "one")
        part.write_bytes(b"12345")
        writer.adopt(FOLDER, part, "0" * 64)
        writer.prune(keep_incoming={FOLDER: set()})
        assert writer.blob_exists(FOLDER, "0" * 64, 5)
    with volume.lock() as writer:
        assert writer.prune(keep_incoming={FOLDER: set()}).bytes == 5


def test_nothing_is_removed_while_it_is_unclear_what_is_active(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, {"a": b"1"})
        writer.activate("bert", snapshot, requested="main")
        record = volume.layout.active("bert").read_bytes()
        volume.layout.active("bert").write_bytes(b"junk")
        with pytest.raises(CorruptBlob):
            writer.prune()
        volume.layout.active("bert").write_bytes(record)
        manifest = volume.layout.manifest(FOLDER, snapshot.digest)
        whole = manifest.read_bytes()
        manifest.write_bytes(b"junk")
        with pytest.raises(CorruptBlob):
            writer.prune()
        newer = manifest_of({"b": b"1"})
        newer.format_version = 2
        volume.layout.manifest(FOLDER, newer.digest).write_bytes(encode_record(newer))
        manifest.write_bytes(whole)
        with pytest.raises(NewerFormat):
            writer.prune()
    assert snapshot.verify() == []


def test_a_damaged_manifest_that_nobody_needs_is_removed(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, {"a": b"1"})
        volume.layout.manifest(FOLDER, snapshot.digest).write_bytes(b"junk")
        assert writer.prune().digests == (snapshot.digest,)
    assert volume.damaged() == []
