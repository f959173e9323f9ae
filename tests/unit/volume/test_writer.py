import errno
import os

import pytest

from modelcache_volume import (
    BadManifest,
    InvalidPath,
    NewerFormat,
    NoSpace,
    SnapshotNotFound,
    Volume,
    VolumeError,
    space_errors,
)
from support.volumes import manifest_of, publish, read

FOLDER = "models--org--name"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def volume(tmp_path):
    return Volume.create(tmp_path / "volume")


def test_a_blob_is_stored_once_and_shared_by_revisions(volume):
    with volume.lock() as writer:
        first = publish(writer, {"a": b"same", "b": b"old"}, commit=OLD)
        inode = first.blob_path(first.file("a")).stat().st_ino
        second = publish(writer, {"a": b"same", "b": b"new"}, commit=NEW)
    assert second.blob_path(second.file("a")).stat().st_ino == inode
    assert [read(snapshot, "b") for snapshot in (first, second)] == [b"old", b"new"]
    assert len(list(volume.layout.blobs(FOLDER).iterdir())) == 3


def test_a_blob_exists_only_whole(volume):
    with volume.lock() as writer:
        part = writer.incoming(FOLDER, "key1")
        part.write_bytes(b"abc")
        assert not writer.blob_exists(FOLDER, "0" * 64, 3)
        writer.adopt(FOLDER, part, "0" * 64)
        assert writer.blob_exists(FOLDER, "0" * 64, 3)
        assert not writer.blob_exists(FOLDER, "0" * 64, 4)
        assert not part.exists()
        writer.discard(FOLDER, "0" * 64)
        assert not writer.blob_exists(FOLDER, "0" * 64, 3)


def test_a_partial_file_survives_its_writer(volume):
    with volume.lock() as writer:
        writer.incoming(FOLDER, "key1").write_bytes(b"half")
    with volume.lock() as writer:
        assert writer.incoming(FOLDER, "key1").read_bytes() == b"half"


def test_a_part_that_is_a_link_is_not_adopted(volume, tmp_path):
    (tmp_path / "secret").write_text("x")
    with volume.lock() as writer:
        part = writer.incoming(FOLDER, "key1")
        part.symlink_to(tmp_path / "secret")
        with pytest.raises(OSError, match="symbolic links"):
            writer.adopt(FOLDER, part, "0" * 64)


def test_the_same_content_of_another_commit_is_one_snapshot_that_knows_both(volume):
    with volume.lock() as writer:
        first = publish(writer, {"a": b"1"}, commit=OLD)
        second = publish(writer, {"a": b"1"}, commit=NEW)
    assert first.digest == second.digest
    assert [revision.commit for revision in second.manifest.revisions] == [OLD, NEW]
    assert second.manifest.source.commit == NEW
    assert all((volume.layout.commit(FOLDER, commit) / "a").read_bytes() == b"1" for commit in (OLD, NEW))
    assert (volume.layout.refs(FOLDER) / "main").read_text() == NEW


def test_publishing_the_same_again_changes_nothing(volume):
    with volume.lock() as writer:
        first = publish(writer, {"a": b"1"}, commit=OLD)
        again = publish(writer, {"a": b"1"}, commit=OLD)
        publish(writer, {"a": b"1"}, commit=NEW)
        back = publish(writer, {"a": b"1"}, commit=OLD)
    assert again.manifest == first.manifest
    assert [revision.commit for revision in back.manifest.revisions] == [NEW, OLD]


def test_another_selection_of_one_commit_shares_its_folder(volume):
    with volume.lock() as writer:
        publish(writer, {"a": b"1"}, commit=OLD)
        publish(writer, {"a": b"1", "b": b"2"}, commit=OLD)
    assert len(volume.snapshots()) == 2
    assert sorted(path.name for path in volume.layout.commit(FOLDER, OLD).iterdir()) == ["a", "b"]


def test_a_file_may_become_a_folder_and_a_folder_a_file(volume):
    with volume.lock() as writer:
        for files in ({"a": b"1"}, {"a/b/c": b"2"}, {"a": b"3"}):
            assert publish(writer, files, commit=OLD).verify() == []
        for ref in ("x", "x/y", "x"):
            publish(writer, {"a": b"1"}, commit=OLD, requested=ref)
            assert (volume.layout.refs(FOLDER) / ref).read_text() == OLD


def test_a_manifest_that_does_not_fit_is_not_published(volume):
    with volume.lock() as writer:
        publish(writer, {"a": b"1"})
        manifest = manifest_of({"a": b"1", "b": b"2"}, commit=NEW)
        with pytest.raises(BadManifest, match="the blob of b"):
            writer.publish(FOLDER, manifest)
        manifest = manifest_of({"a": b"1"}, commit=NEW)
        manifest.digest = "0" * 64
        with pytest.raises(BadManifest, match="digest"):
            writer.publish(FOLDER, manifest)
        manifest = manifest_of({"a": b"1"}, commit="../x")
        with pytest.raises(InvalidPath):
            writer.publish(FOLDER, manifest)
        manifest = manifest_of({"a": b"1"}, commit=NEW, requested="../../x")
        with pytest.raises(InvalidPath):
            writer.publish(FOLDER, manifest)
        manifest = manifest_of({"a": b"1"}, commit=NEW)
        manifest.format_version = 9
        with pytest.raises(NewerFormat):
            writer.publish(FOLDER, manifest)
    assert not volume.layout.commit(FOLDER, NEW).exists()
    assert len(volume.snapshots()) == 1


def test_a_damaged_manifest_is_replaced_by_publishing_again(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, {"a": b"1"})
        volume.layout.manifest(FOLDER, snapshot.digest).write_bytes(b"junk")
        assert publish(writer, {"a": b"1"}).verify() == []
    assert volume.damaged() == []


def test_generations_grow_only_when_something_changes(volume):
    with volume.lock() as writer:
        first, second = publish(writer, {"a": b"1"}, commit=OLD), publish(writer, {"a": b"2"}, commit=NEW)
        one = writer.activate("bert", first, requested="main")
        assert writer.activate("bert", first, requested="main") == one
        assert (one.generation, one.digest, one.commit, one.folder) == (1, first.digest, OLD, FOLDER)
        kept = writer.activate("bert", first, requested="main", history_limit=3)
        assert (kept.generation, kept.history_limit, kept.activated_at) == (1, 3, one.activated_at)
        assert writer.activate("bert", first, requested="v1").generation == 2
        assert writer.activate("bert", second, requested="main").generation == 3
    assert volume.active("bert").generation == 3


def test_history_is_what_was_active_before_newest_first_and_no_longer_than_its_limit(volume):
    with volume.lock() as writer:
        snapshots = [publish(writer, {"a": bytes([n])}, commit=str(n) * 40) for n in range(4)]

        def activate(n, limit=2):
            active = writer.activate("bert", snapshots[n], requested="main", history_limit=limit)
            return [entry.commit[0] for entry in active.history]

        assert activate(0) == []
        assert activate(1) == ["0"]
        assert activate(2) == ["1", "0"]
        assert activate(3) == ["2", "1"]
        assert activate(2) == ["3", "1"]
        assert activate(0, limit=0) == []


def test_the_same_content_of_a_new_commit_does_not_push_out_the_history(volume):
    with volume.lock() as writer:
        writer.activate("bert", publish(writer, {"a": b"1"}, commit=OLD), requested="main")
        writer.activate("bert", publish(writer, {"a": b"2"}, commit=NEW), requested="main")
        active = writer.activate("bert", publish(writer, {"a": b"2"}, commit="c" * 40), requested="main")
    assert (active.generation, active.commit) == (3, "c" * 40)
    assert [entry.commit for entry in active.history] == [OLD]


def test_activating_an_older_selection_restores_the_links_that_a_newer_one_took(volume):
    with volume.lock() as writer:
        older = publish(writer, {"a": b"1"}, commit=OLD)
        publish(writer, {"a/b": b"2"}, commit=OLD)
        assert older.verify() != []
        writer.activate("bert", older, requested="main")
    assert older.verify() == []


def test_a_pruned_snapshot_cannot_be_activated(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, {"a": b"1"})
        writer.prune()
        with pytest.raises(SnapshotNotFound):
            writer.activate("bert", snapshot, requested="main")
    assert volume.actives() == []


def test_model_cache_leads_to_the_active_snapshot_of_a_bucket(volume):
    link = volume.layout.model_cache / "bucket"
    source = {"repo_id": "s3://bucket/prefix", "requested": ""}
    with volume.lock() as writer:
        first = publish(writer, {"a": b"1"}, commit=OLD, **source)
        second = publish(writer, {"a": b"2"}, commit=NEW, **source)
        writer.activate("m", first, requested="")
        assert (link / "a").read_bytes() == b"1"
        assert not link.readlink().is_absolute()
        writer.activate("m", second, requested="")
        assert (link / "a").read_bytes() == b"2"
        writer.prune()
        assert (link / "a").read_bytes() == b"2"
        writer.deactivate("m")
        writer.deactivate("m")
    assert list(volume.layout.model_cache.iterdir()) == []
    assert not volume.layout.refs(first.folder).exists()


def test_what_a_dead_writer_was_about_to_rename_is_removed_by_the_next(volume):
    (volume.layout.temporary / "0").write_bytes(b"x")
    (volume.layout.temporary / "1").symlink_to("x")
    with volume.lock():
        assert list(volume.layout.temporary.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_volume_is_one_sentence_that_says_what_to_do(tmp_path, code):
    sentence = r"storing x.*12345 bytes are needed, \d+ are free.*spec\.storage\.size"
    with pytest.raises(NoSpace, match=sentence), space_errors(tmp_path, "storing x", 12345):
        raise OSError(code, os.strerror(code))


def test_a_read_only_volume_is_one_sentence_too_and_other_errors_pass(tmp_path):
    with pytest.raises(VolumeError, match="mount it writable"), space_errors(tmp_path, "storing x"):
        raise OSError(errno.EROFS, "Read-only file system", "x")
    with pytest.raises(ConnectionResetError), space_errors(tmp_path, "storing x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
