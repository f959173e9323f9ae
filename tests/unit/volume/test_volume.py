import os
import stat
import threading
import time

import pytest

from modelcache_volume import (
    BLOCK_BYTES,
    LEASE_SECONDS,
    CorruptBlob,
    FileNotInSnapshot,
    NewerFormat,
    NoActiveRevision,
    NotAVolume,
    SnapshotNotFound,
    Volume,
    VolumeBusy,
    VolumeError,
)
from modelcache_volume.records import decode_record, encode_record
from modelcache_volume.v1 import manifest_pb2
from support.volumes import publish, read

FILES = {"config.json": b"{}", "sub/data.bin": os.urandom(BLOCK_BYTES + 5), "empty": b""}


@pytest.fixture
def volume(tmp_path):
    return Volume.create(tmp_path / "volume")


@pytest.fixture
def snapshot(volume):
    with volume.lock() as writer:
        snapshot = publish(writer, FILES)
        writer.activate("bert", snapshot, requested="main")
    return snapshot


def test_an_empty_or_missing_folder_becomes_a_volume_and_stays_one(tmp_path):
    (tmp_path / "there" / "lost+found").mkdir(parents=True)
    for root in (tmp_path / "there", tmp_path / "not" / "there"):
        assert Volume.create(root).root == root
        assert Volume.create(root).snapshots() == []
        assert (root / "FORMAT").read_text() == "1\n"
        assert Volume.open(root).actives() == []


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(NotAVolume, match="neither empty nor"):
        Volume.create(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]
    with pytest.raises(NotAVolume, match="neither empty nor"):
        Volume.create(tmp_path / "thesis.tex")


def test_what_is_no_volume_is_not_opened(tmp_path):
    with pytest.raises(NotAVolume, match="no FORMAT"):
        Volume.open(tmp_path)
    with pytest.raises(NotAVolume, match="no FORMAT"):
        Volume.open(tmp_path / "missing")
    (tmp_path / "FORMAT").write_text("PNG")
    with pytest.raises(NotAVolume, match="number"):
        Volume.open(tmp_path)


def test_a_volume_of_a_newer_format_is_refused_naming_both_numbers(volume):
    (volume.root / "FORMAT").write_text("7\n")
    for attempt in (Volume.open, Volume.create):
        with pytest.raises(NewerFormat, match=r"format 7.*up to 1"):
            attempt(volume.root)


def test_a_volume_opens_read_only_and_writes_nothing(volume, snapshot):
    def state():
        return sorted((path, path.lstat().st_mtime_ns) for path in volume.root.rglob("*"))

    before = state()
    opened = Volume.open(volume.root)
    assert [found.digest for found in opened.snapshots()] == [snapshot.digest]
    assert opened.active("bert").digest == snapshot.digest
    assert opened.snapshot(snapshot.digest).verify() == []
    assert opened.leased() == set()
    assert state() == before


def test_files_are_readable_for_other_users_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        volume = Volume.create(tmp_path / "v")
        with volume.lock() as writer:
            writer.activate("bert", publish(writer, FILES), requested="main")
    finally:
        os.umask(before)
    for path in volume.root.rglob("*"):
        if path.name == "leases":
            assert stat.S_IMODE(path.stat().st_mode) == 0o775
        elif path.name not in {".tmp", ".lock"} and not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_a_snapshot_gives_its_files_by_path(volume, snapshot):
    assert {path: read(snapshot, path) for path in FILES} == FILES
    assert (snapshot.commit_folder() / "sub" / "data.bin").read_bytes() == FILES["sub/data.bin"]
    with pytest.raises(FileNotInSnapshot, match=r"org/name has no file 'model\.bin'"):
        snapshot.file("model.bin")


def test_an_unknown_digest_or_name_is_an_error_that_says_so(volume, snapshot):
    with pytest.raises(SnapshotNotFound, match="never fetched"):
        volume.snapshot("0" * 64)
    with pytest.raises(SnapshotNotFound, match="not a digest"):
        volume.snapshot("../../../etc/passwd")
    with pytest.raises(NoActiveRevision, match="'gpt2'"):
        volume.active("gpt2")


def test_a_manifest_with_any_flipped_bit_is_never_served(volume, snapshot):
    path = volume.layout.manifest(snapshot.folder, snapshot.digest)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptBlob, match="is damaged"):
            volume.snapshot(snapshot.digest)
    assert volume.snapshots() == []
    assert [problem.path for problem in volume.damaged()] == [str(path)]
    for length in (0, 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptBlob):
            volume.snapshot(snapshot.digest)


def test_a_manifest_under_another_digests_name_is_never_served(volume, snapshot):
    path = volume.layout.manifest(snapshot.folder, snapshot.digest)
    path.rename(volume.layout.manifest(snapshot.folder, "0" * 64))
    with pytest.raises(CorruptBlob, match="it is the manifest of"):
        volume.snapshot("0" * 64)


def test_a_manifest_whose_files_are_not_its_digests_is_never_served(volume, snapshot):
    path = volume.layout.manifest(snapshot.folder, snapshot.digest)
    forged = decode_record(manifest_pb2.Manifest, path.read_bytes(), "")
    forged.files[0].path = "../x"
    path.write_bytes(encode_record(forged))
    with pytest.raises(CorruptBlob, match=r"component '\.\.'"):
        volume.snapshot(snapshot.digest)
    forged.files[0].path = "conf"
    path.write_bytes(encode_record(forged))
    with pytest.raises(CorruptBlob, match="not that of its files"):
        volume.snapshot(snapshot.digest)


def test_records_of_a_newer_program_are_refused(volume, snapshot):
    manifest_path = volume.layout.manifest(snapshot.folder, snapshot.digest)
    newer = decode_record(manifest_pb2.Manifest, manifest_path.read_bytes(), "")
    newer.format_version = 2
    manifest_path.write_bytes(encode_record(newer))
    active = volume.active("bert")
    active.format_version = 2
    volume.layout.active("bert").write_bytes(encode_record(active))
    for attempt in (lambda: volume.snapshot(snapshot.digest), volume.snapshots, volume.actives):
        with pytest.raises(NewerFormat, match=r"format 2.*up to 1"):
            attempt()


def test_an_active_record_of_another_name_or_damaged_is_refused(volume, snapshot):
    path = volume.layout.active("bert")
    volume.layout.active("other").write_bytes(path.read_bytes())
    with pytest.raises(CorruptBlob, match="'bert'"):
        volume.active("other")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptBlob, match="checksum"):
        volume.active("bert")


def test_a_record_on_disk_is_the_plain_protobuf_message(volume, snapshot):
    data = volume.layout.manifest(snapshot.folder, snapshot.digest).read_bytes()
    plain = manifest_pb2.Manifest.FromString(data)
    assert [file.path for file in plain.files] == ["config.json", "empty", "sub/data.bin"]


def replace_by_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "missing": (lambda path: path.unlink(), "cannot be opened"),
    "shorter": (lambda path: os.truncate(path, 5), "5 bytes long"),
    "longer": (lambda path: os.truncate(path, BLOCK_BYTES * 2), "bytes long"),
    "link": (replace_by_link, "cannot be opened"),
    "fifo": (replace_by_fifo, "no regular file"),
    "folder": (replace_by_folder, "no regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_blob_that_is_not_what_was_published_is_not_opened(volume, snapshot, damage):
    inflict, reason = DAMAGES[damage]
    file = snapshot.file("sub/data.bin")
    inflict(snapshot.blob_path(file))
    with pytest.raises(CorruptBlob, match=reason) as caught:
        snapshot.open_blob(file)
    assert (caught.value.path, caught.value.sha256) == ("sub/data.bin", file.sha256.hex())
    assert "sub/data.bin" in {problem.path for problem in snapshot.verify()}


@pytest.mark.parametrize(("position", "block"), [(0, 0), (BLOCK_BYTES - 1, 0), (BLOCK_BYTES, 1), (BLOCK_BYTES + 4, 1)])
def test_verify_finds_one_flipped_bit_and_names_file_and_block(volume, snapshot, position, block):
    path = snapshot.blob_path(snapshot.file("sub/data.bin"))
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    problems = snapshot.verify()
    assert [problem.path for problem in problems] == ["sub/data.bin"]
    assert f"block {block} " in problems[0].what


def test_verify_finds_a_link_that_leads_elsewhere(volume, snapshot):
    link = snapshot.commit_folder() / "config.json"
    link.unlink()
    link.symlink_to("/etc/hostname")
    assert [problem.path for problem in snapshot.verify()] == ["config.json"]


def test_verify_tells_how_far_it_is(volume, snapshot):
    seen = []
    assert snapshot.verify(seen.append) == []
    assert sum(seen) == sum(map(len, FILES.values()))


def test_a_lease_counts_for_ten_minutes_after_it_was_renewed(volume, snapshot):
    assert volume.leased() == set()
    volume.renew_lease(snapshot.digest, "pod-1.ns")
    assert volume.leased() == {snapshot.digest}
    assert volume.leased(now=time.time() + LEASE_SECONDS - 5) == {snapshot.digest}
    assert volume.leased(now=time.time() + LEASE_SECONDS + 5) == set()
    path = volume.layout.lease(snapshot.digest, "pod-1.ns")
    os.utime(path, (1, 1))
    assert volume.leased() == set()
    volume.renew_lease(snapshot.digest, "pod-1.ns")
    assert volume.leased() == {snapshot.digest}


def test_only_what_is_published_can_be_leased(volume, snapshot):
    with pytest.raises(SnapshotNotFound):
        volume.renew_lease("0" * 64, "pod")
    assert list(volume.layout.leases.iterdir()) == []


def test_a_lease_that_is_a_link_touches_nothing_elsewhere(volume, snapshot, tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("x")
    os.utime(target, (1, 1))
    volume.layout.lease(snapshot.digest, "pod").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        volume.renew_lease(snapshot.digest, "pod")
    assert target.stat().st_mtime == 1


def test_a_second_writer_is_refused_and_told_who_is_first(volume):
    with volume.lock(), pytest.raises(VolumeBusy, match=f"process {os.getpid()} on "), Volume.open(volume.root).lock():
        pytest.fail("two writers")
    with volume.lock():
        pass


def test_a_second_writer_can_wait_for_the_first(volume):
    first_holds, order = threading.Event(), []

    def second():
        first_holds.wait(10)
        with volume.lock(wait=30):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with volume.lock():
        first_holds.set()
        with pytest.raises(VolumeBusy), volume.lock(wait=0.2):
            pytest.fail("two writers")
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_errors_of_the_caller_pass_the_lock_unchanged_and_release_it(volume):
    with pytest.raises(PermissionError), volume.lock():
        raise PermissionError(13, "mine")
    with volume.lock():
        pass


def test_foreign_files_on_a_volume_do_no_harm(volume, snapshot):
    (volume.layout.hub / "CACHEDIR.TAG").write_text("x")
    (volume.layout.hub / ".locks").mkdir()
    (volume.layout.hub / "datasets--a--b").mkdir()
    (volume.layout.manifests(snapshot.folder) / "notes.pb").write_text("x")
    (volume.layout.actives / "..pb").write_text("x")
    (volume.layout.leases / "readme").write_text("x")
    assert len(volume.snapshots()) == len(volume.actives()) == 1
    with volume.lock() as writer:
        writer.prune()
    assert volume.snapshot(snapshot.digest).verify() == []


def test_every_error_of_the_package_has_one_base():
    assert issubclass(CorruptBlob, VolumeError)
    assert issubclass(VolumeBusy, VolumeError)
