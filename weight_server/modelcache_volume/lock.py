"""The writer's lock of a volume: one writer at a time, across processes and threads."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from modelcache_volume.disk import FILE_MODE
from modelcache_volume.errors import VolumeBusy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_POLL_SECONDS = 0.05


@contextmanager
def writer_lock(path: Path, *, wait: float = 0) -> Iterator[None]:
    """Holds the lock file `path`.

    It is flock(2) on an open file of its own: the kernel releases it when the process dies, however it dies, and two
    threads of one process exclude each other too.

    Args:
        path: The lock file; made if missing, never removed.
        wait: Seconds to wait for another writer; 0: not at all.

    Raises:
        VolumeBusy: Another writer still holds it; names it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        _acquire(descriptor, path, time.monotonic() + wait)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        with suppress(OSError):  # a full volume must still be locked, to be pruned
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining > 0:
                time.sleep(min(_POLL_SECONDS, remaining))
                continue
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
            raise VolumeBusy(
                f"The volume {path.parent} is being written by {holder}. Wait for it to finish, or stop it; "
                "a process that died holds no lock."
            ) from None
        return
