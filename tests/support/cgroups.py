"""Memory limits as containers have them: a cgroup of its own (version 1 or 2), removed at the end."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOTS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]


class NoCgroups(Exception):
    """This machine, or this user, cannot make memory cgroups; the text says why."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup with a memory limit, page cache included; where there is swap, it may be used.

    Attributes:
        folder: in the cgroup file system.
    """

    folder: Path

    @classmethod
    @contextlib.contextmanager
    def limited(cls, nbytes: int) -> Iterator["MemoryCgroup"]:
        """Make one; its processes must have ended when the context is left.

        Raises:
            NoCgroups: there are none to be had.
        """
        root = next((root for root in _ROOTS if (root / "cgroup.procs").exists()), None)
        if root is None or not os.access(root, os.W_OK):
            raise NoCgroups("needs the right to make cgroups")
        group = cls(root / f"modelcache-test-{os.getpid()}")
        group.folder.mkdir()
        try:
            limits = [group.folder / name for name in ("memory.limit_in_bytes", "memory.max")]
            limit = next((path for path in limits if path.exists()), None)
            if limit is None:
                raise NoCgroups("the memory controller is not enabled here")
            limit.write_text(str(nbytes))
            yield group
        finally:
            group._remove()

    @property
    def processes(self) -> Path:
        """The file by which processes enter: their id, or 0 for the one that writes."""
        return self.folder / "cgroup.procs"

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed."""
        counters = [self.folder / name for name in ("memory.oom_control", "memory.events")]
        text = next(path for path in counters if path.exists()).read_text(encoding="ascii")
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        assert found is not None, text
        return int(found[1])

    def _remove(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.folder.rmdir()
            except OSError:  # a process that was just reaped may still be counted
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return
