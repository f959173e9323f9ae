"""What can go wrong with a volume: one small hierarchy, every message a sentence that says what to do."""

from __future__ import annotations


class VolumeError(Exception):
    """Base of all errors of this package."""


class NotAVolume(VolumeError):
    """The folder is not a ModelCache volume (it has no FORMAT file), or cannot become one because it is not empty."""


class NewerFormat(VolumeError):
    """The volume, a manifest or an active record was written by a newer program than this one."""


class VolumeBusy(VolumeError):
    """Another process or thread holds the volume's writer lock."""


class NoSpace(VolumeError):
    """The volume is full, or a quota is used up. What was already written stays and is continued by the next run."""


class SnapshotNotFound(VolumeError):
    """No snapshot with that digest is published on the volume."""


class NoActiveRevision(VolumeError):
    """Nothing was activated under that name on the volume."""


class FileNotInSnapshot(VolumeError):
    """The snapshot has no file of that path."""


class InvalidPath(VolumeError):
    """A name that must not become a path on the volume: it leaves its folder, clashes, or cannot be stored."""


class BadWeights(VolumeError):
    """A weight file or its index is truncated, malformed, or asks for something that this package refuses to do."""


class BadManifest(VolumeError):
    """A manifest contradicts itself, or does not fit what is on the volume, and so is not published."""


class CorruptBlob(VolumeError):
    """Bytes on the volume are not the ones that were published.

    Attributes:
        path: The file's path in its snapshot, or the damaged record's path on the volume.
        sha256: The blob's name: 64 hex digits; "" for a record.
        block: Number of the first damaged aligned 4 MiB block, where one is known.
    """

    def __init__(self, message: str, *, path: str, sha256: str = "", block: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.sha256 = sha256
        self.block = block


class ChecksumMismatch(VolumeError):
    """Bytes that were written are not those that were announced."""
