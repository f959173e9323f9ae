"""What the ways of getting bytes (HTTP, gRPC, a local volume) have in common."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ByteStream", "CorruptAtServer", "LaneBroken"]


class LaneBroken(Exception):
    """A lane failed in a way that another attempt, or another server, may not."""


class CorruptAtServer(LaneBroken):
    """The server found that what is on its volume is not what was published, and sent nothing."""


class ByteStream(Protocol):
    """Consecutive bytes of one file, on their way."""

    def read_into(self, view: memoryview) -> int:
        """Receives up to ``len(view)`` bytes, at least one, and returns how many; raises LaneBroken."""

    def close(self) -> None:
        """Ends the stream; what it used is used again if all of its bytes were read."""

    def discard(self) -> None:
        """Ends the stream; what it used is not used again."""

    def abort(self) -> None:
        """Breaks the stream from another thread."""
