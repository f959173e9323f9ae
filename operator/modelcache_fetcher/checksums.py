"""Which checksums of a source can be computed, beyond those of the volume's hasher: CRC-64/NVME, S3's default.

See https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import modelcache_volume
from modelcache_volume import ContentDigests, ContentHasher

_HAS_CRC64NVME = find_spec("awscrt") is not None

ALGORITHMS = modelcache_volume.ALGORITHMS | {"sha256"} | ({"crc64nvme"} if _HAS_CRC64NVME else set())


class SourceHasher:
    """A ContentHasher that also knows the clouds' own checksums.

    Args:
        size: Length of the content in bytes.
        algorithms: Names from ``ALGORITHMS``.
    """

    def __init__(self, size: int, algorithms: Sequence[str]) -> None:
        wanted = set(algorithms)
        self._hasher = ContentHasher(size, sorted(wanted & modelcache_volume.ALGORITHMS))
        self._crc64: int | None = 0 if "crc64nvme" in wanted else None

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        self._hasher.update(data)
        if self._crc64 is not None:
            from awscrt import checksums  # noqa: PLC0415 - a large library that only S3 needs

            self._crc64 = checksums.crc64nvme(data, self._crc64)

    def result(self) -> ContentDigests:
        """The checksums, once all bytes were given."""
        digests = self._hasher.result()
        if self._crc64 is not None:
            digests.extra["crc64nvme"] = self._crc64.to_bytes(8, "big")
        return digests
