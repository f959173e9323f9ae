"""The manifest's entry of a file: what it is and how it was checked at its source. Pure."""

from modelcache_fetcher.transfer import Received
from modelcache_volume.v1 import manifest_pb2


def manifest_file(received: Received) -> manifest_pb2.File:
    """The entry of a complete file, whose strongest checksum says how it was verified."""
    file, digests = received.file, received.digests
    entry = manifest_pb2.File(
        path=file.path,
        size=file.size,
        sha256=digests.sha256,
        block_crc32c=digests.block_crc32c,
        etag=file.etag,
        git_oid=file.git_oid,
        lfs_sha256=file.lfs_sha256,
        verification=file.unchecked,
        verified_with=file.unchecked_note,
    )
    if file.checksums:
        entry.verification = file.checksums[0].kind
        entry.verified_with = str(file.checksums[0])
    return entry
