"""Keeps a pinned snapshot from being pruned while somebody holds it, and notices what is active meanwhile."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Final

from modelcache.deadline import Deadline
from modelcache.errors import ModelCacheError
from modelcache.lane import LaneBroken

if TYPE_CHECKING:
    from modelcache.connection import PinnedSnapshot

__all__ = ["RENEW_SECONDS", "LeaseKeeper"]

logger = logging.getLogger("modelcache")

# The server forgets a lease after 10 minutes.
RENEW_SECONDS: Final = 180.0


class LeaseKeeper:
    """Asks the server about the pinned digest from time to time, as long as this object lives.

    Args:
        snapshot: what is pinned.
        seconds: between two calls.
    """

    def __init__(self, snapshot: PinnedSnapshot, *, seconds: float = RENEW_SECONDS) -> None:
        self.snapshot = snapshot
        self.active_digest = snapshot.digest
        self.available = True
        self._ended = threading.Event()
        # The thread knows this object by a weak reference only: a model that is forgotten ends its lease.
        self._thread = threading.Thread(
            target=_renew, args=(weakref.ref(self), self._ended, seconds), name="modelcache-lease", daemon=True
        )
        weakref.finalize(self, self._ended.set)
        self._thread.start()

    def renew(self) -> None:
        """Renews the lease now, and notes what is active."""
        response = self.snapshot.connection.revision(self.snapshot.digest, Deadline(20.0))
        self.active_digest = response.active.digest
        self.available = response.known_digest_available

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _renew(reference: weakref.ref[LeaseKeeper], ended: threading.Event, seconds: float) -> None:
    while not ended.wait(seconds):
        keeper = reference()
        if keeper is None:
            return
        try:
            keeper.renew()
        except (LaneBroken, ModelCacheError) as error:
            logger.warning("The lease of %s could not be renewed: %s", keeper.snapshot.digest[:12], error)
        del keeper
