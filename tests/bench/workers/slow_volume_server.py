"""`modelcache-server` over a volume that gives 50 MB/s, as a network disk may."""

import os
import sys
import threading
import time

from modelcache_server.__main__ import main

BYTES_PER_SECOND = 50e6


class SlowDisk:
    """os.preadv, one reader after the other, at a bounded rate."""

    def __init__(self) -> None:
        self._preadv = os.preadv
        self._lock = threading.Lock()
        self._free_at = 0.0

    def preadv(self, descriptor, buffers, offset):
        count = self._preadv(descriptor, buffers, offset)
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / BYTES_PER_SECOND
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))
        return count


if __name__ == "__main__":
    os.preadv = SlowDisk().preadv
    sys.exit(main())
