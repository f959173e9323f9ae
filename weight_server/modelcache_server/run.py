"""Runs a server in the foreground until it is told to stop."""

import ctypes
import signal
import sys
import threading
from types import FrameType

from modelcache_server.server import Server
from modelcache_server.settings import ServerSettings

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to reuse the memory of messages of 1-2 MiB instead of asking the kernel for each one anew."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library: slower gRPC, nothing else
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def serve_until_signalled(settings: ServerSettings, grace: float) -> None:
    """Serve until SIGTERM or SIGINT, then stop within the drain time and `grace` seconds.

    Raises:
        ServerError, VolumeError, ValueError: it cannot start.
    """
    told = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if told.is_set():  # a second signal: the user does not want to wait
            sys.exit(128 + number)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    keep_freed_memory()
    server = Server(settings)
    server.start()
    try:
        told.wait()
    finally:
        server.stop(grace)
