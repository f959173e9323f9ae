"""A writer that is killed, or runs out of room, at every step leaves the old state or the new one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest

from modelcache_volume import LEASE_SECONDS, NoSpace, Volume
from support.volumes import publish

STEPS = ("open", "fsync", "rename", "symlink", "mkdir", "unlink", "rmdir", "chmod", "fchmod", "ftruncate", "pwrite")
KILLED, FINISHED, NO_ROOM = "killed", "finished", "no room"


def old_state(root):
    """Two published revisions, the newer active, and a bucket beside them."""
    volume = Volume.create(root)
    with volume.lock() as writer:
        oldest = publish(writer, {"same": b"s" * 5000, "deep/est/own": b"0" * 900}, commit="0" * 40)
        writer.activate("bert", oldest, requested="main")
        old = publish(writer, {"same": b"s" * 5000, "deep/own": b"1" * 900}, commit="1" * 40)
        writer.activate("bert", old, requested="main")
        bucket = publish(writer, {"x": b"bucket"}, repo_id="s3://bucket/x", requested="", commit="b" * 40)
        writer.activate("bucket", bucket, requested="")
    return volume


def next_revision(root):
    """What a fetch does with a new revision: blobs, publish, activate, prune."""
    with Volume.create(root).lock() as writer:
        new = publish(writer, {"same": b"s" * 5000, "deep/own": b"2" * 900, "new/file": b"n"}, commit="2" * 40)
        writer.activate("bert", new, requested="main")
        bucket = publish(writer, {"x": b"other"}, repo_id="s3://bucket/x", requested="", commit="c" * 40)
        writer.activate("bucket", bucket, requested="", history_limit=0)
        writer.prune()


def first_revision(root):
    """The same on a folder that is no volume yet."""
    with Volume.create(root).lock() as writer:
        writer.activate("bert", publish(writer, {"a/b": b"1", "c": b"2"}), requested="main")
        writer.prune()


def everything_goes(root):
    with Volume.open(root).lock() as writer:
        writer.deactivate("bert")
        writer.deactivate("bucket")
        writer.prune()


def interrupt(action, root, at, how):
    """Runs `action` in a child process that meets its end at its step number `at`; tells what became of it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _run_interrupted(action, root, at, how)
        except BaseException:  # noqa: BLE001  nothing of the test may go on in the child
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return KILLED
    return {0: FINISHED, 3: NO_ROOM}[os.waitstatus_to_exitcode(status)]


def _run_interrupted(action, root, at, how):
    count = 0

    def stepping(real):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                how()
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, stepping(getattr(os, name)))
    try:
        action(root)
    except NoSpace:
        return 3
    return 0


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(root):
    """Every file and link with what it is; folders count by what is in them."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            found[str(path.relative_to(root))] = f"-> {path.readlink()}" if path.is_symlink() else "file"
    return found


def state(root):
    """(name, commit, generation, history) of what is active; all that is published is whole."""
    volume = Volume.open(root)
    assert volume.damaged() == []
    for snapshot in volume.snapshots():
        assert snapshot.verify() == []
    actives = volume.actives()
    for active in actives:
        assert volume.snapshot(active.digest, active.folder).manifest.source.commit == active.commit
    return [(a.name, a.commit, a.generation, [old.commit for old in a.history]) for a in actives]


@pytest.fixture
def memory():
    """A folder in memory, where there is one: a killed process loses nothing there, and fsync costs nothing."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


SCENARIOS = {
    "next revision": (old_state, next_revision),
    "first revision": (lambda root: None, first_revision),
    "everything goes": (old_state, everything_goes),
}


@pytest.mark.parametrize("how", [kill_itself, disk_full], ids=lambda how: how.__name__)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_interrupted_at_any_step_it_is_whole_and_the_next_run_finishes(memory, scenario, how):
    prepare, action = SCENARIOS[scenario]
    before = memory / "before"
    prepare(before)
    states_before = state(before) if before.exists() else []
    after = memory / "after"
    if before.exists():
        shutil.copytree(before, after, symlinks=True)
    action(after)
    states_after = state(after)
    allowed = {json.dumps(entry) for entry in states_before + states_after}

    work, at, seen = memory / "work", 0, []
    while seen[-5:] != [FINISHED] * 5:  # what is only for information may fail without harm
        at += 1
        if before.exists():
            shutil.copytree(before, work, symlinks=True)
        seen.append(interrupt(action, work, at, how))
        if (work / "FORMAT").exists():
            found = state(work)
            assert {json.dumps(entry) for entry in found} <= allowed, at
            assert len(found) in {len(states_before), len(states_after)} or scenario == "everything goes"
        action(work)
        assert state(work) == states_after, at
        assert tree(work) == tree(after), at
        shutil.rmtree(work)
    assert len(seen) - seen.count(FINISHED) > 30


def test_every_name_is_durable_before_something_refers_to_it(  # noqa: C901  a small model of a disk
    tmp_path, monkeypatch
):
    # A power failure may lose every name in a folder that was not fsynced and every byte of a file that was not.
    volume = old_state(tmp_path / "v")
    paths, dirty_folders, synced_files, checked = {}, {}, set(), []

    def parent(path):
        return str(Path(path).parent)

    def changed(path):
        if "/.tmp" not in os.fspath(path):
            dirty_folders.setdefault(parent(path), []).append(os.fspath(path))

    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "symlink", "mkdir")}

    def open_(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        paths[descriptor] = os.fspath(path)
        return descriptor

    def fsync(descriptor):
        real["fsync"](descriptor)
        synced_files.add(paths[descriptor])
        dirty_folders.pop(paths[descriptor], None)

    def rename(source, target):
        source, target = os.fspath(source), os.fspath(target)
        if target.endswith(".pb"):
            checked.append(target)
            refs = {folder for folder in dirty_folders if "/refs" in folder or "/incoming" in folder}
            assert set(dirty_folders) <= refs, f"not durable when {target} appears: {dirty_folders}"
        if not Path(source).is_symlink():
            assert source in synced_files, f"{source} was not fsynced before it became {target}"
        real["rename"](source, target)
        changed(target)

    def symlink(target, link, *args, **kwargs):
        real["symlink"](target, link)
        changed(link)

    def mkdir(path, *args, **kwargs):
        real["mkdir"](path, *args, **kwargs)
        changed(path)

    for name, fake in {"open": open_, "fsync": fsync, "rename": rename, "symlink": symlink, "mkdir": mkdir}.items():
        monkeypatch.setattr(os, name, fake)
    with volume.lock() as writer:
        new = publish(writer, {"deep/er/a": b"1", "b": b"2"}, commit="2" * 40, repo_id="s3://bucket/x", requested="")
        writer.activate("bucket", new, requested="")
    assert len(checked) == 2


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("scenario", ["next revision", "first revision"])
def test_a_disk_that_is_full_sooner_or_later_loses_nothing(small_disk, tmp_path, scenario):
    prepare, action = SCENARIOS[scenario]
    states_before = state(prepare(tmp_path / "before").root) if scenario == "next revision" else []
    outcomes = set()
    for pages in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 60):
        work, ballast = small_disk / "work", small_disk / "ballast"
        if states_before:
            shutil.copytree(tmp_path / "before", work, symlinks=True)
        free = os.statvfs(small_disk).f_bavail - pages
        ballast.write_bytes(bytes(free * os.statvfs(small_disk).f_frsize))
        try:
            action(work)
            outcomes.add(FINISHED)
        except NoSpace:
            outcomes.add(NO_ROOM)
            if (work / "FORMAT").exists():
                assert len(state(work)) in {len(states_before), 2}
                with Volume.open(work).lock() as writer:
                    writer.prune()
        ballast.unlink()
        action(work)
        assert len(state(work)) == (2 if states_before else 1)
        shutil.rmtree(work)
    assert outcomes == {FINISHED, NO_ROOM}


def test_a_writer_that_was_killed_holds_no_lock(tmp_path):
    volume = old_state(tmp_path / "v")
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with volume.lock():
                os.write(tell, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with volume.lock(wait=0):
        pass


def test_a_reader_sees_one_state_or_the_other_while_the_writer_switches(memory):
    volume = old_state(memory / "v")
    with volume.lock() as writer:
        two = [publish(writer, {"f": bytes([n])}, commit=str(n) * 40) for n in (7, 8)]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                valid = {(snapshot.digest, snapshot.manifest.source.commit) for snapshot in two}
                reader = Volume.open(volume.root)
                seen = set()
                while (
                    active := reader.active("m" if (volume.layout.active("m")).exists() else "bert")
                ).generation < 300:
                    if active.name == "m":
                        assert (active.digest, active.commit) in valid
                        seen.add(active.digest)
                code = 0
            finally:
                os._exit(code)
        for turn in range(300):
            writer.activate("m", two[turn % 2], requested="main")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_leases_of_the_distant_past_do_not_pile_up(tmp_path):
    volume = old_state(tmp_path / "v")
    digest = volume.active("bert").digest
    for pod in range(50):
        volume.renew_lease(digest, f"pod-{pod}")
        os.utime(volume.layout.lease(digest, f"pod-{pod}"), (1, 1))
    volume.renew_lease(digest, "alive")
    with volume.lock() as writer:
        writer.prune()
    assert [path.name for path in volume.layout.leases.iterdir()] == [f"{digest}.alive"]
    assert volume.leased() == {digest}
    assert LEASE_SECONDS == 600
