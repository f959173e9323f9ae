import hashlib
import random
import subprocess
import zlib

import crc32c
import pytest

from modelcache_volume import BLOCK_BYTES, ChecksumMismatch, ContentHasher, snapshot_digest

CONTENT = random.Random(7).randbytes(2 * BLOCK_BYTES + 12345)


def digests(content, chunk, algorithms=()):
    hasher = ContentHasher(len(content), algorithms)
    view = memoryview(content)
    for start in range(0, len(content), chunk):
        hasher.update(view[start : start + chunk])
    return hasher.result()


@pytest.mark.parametrize("chunk", [len(CONTENT), BLOCK_BYTES, BLOCK_BYTES + 1, 1_000_003, 65536])
def test_chunks_of_any_size_give_the_same_checksums(chunk):
    found = digests(CONTENT, chunk)
    assert found.sha256 == hashlib.sha256(CONTENT).digest()
    blocks = [CONTENT[start : start + BLOCK_BYTES] for start in range(0, len(CONTENT), BLOCK_BYTES)]
    assert found.block_crc32c == tuple(crc32c.crc32c(block) for block in blocks)


def test_known_answer_of_crc32c():
    # RFC 3720, B.4: 32 bytes of zeroes.
    assert digests(bytes(32), 5).block_crc32c == (0x8A9136AA,)


def test_a_file_that_ends_with_a_block_has_no_empty_one():
    assert len(digests(CONTENT[: 2 * BLOCK_BYTES], 1_000_000).block_crc32c) == 2
    assert digests(b"", 1).block_crc32c == ()


def test_the_sources_checksums_come_from_the_same_pass():
    extra = digests(CONTENT, 99_999, ["git-blob-sha1", "md5", "sha1", "crc32c", "crc32"]).extra
    git = subprocess.run(["git", "hash-object", "--stdin"], input=CONTENT, capture_output=True, check=True)
    assert extra["git-blob-sha1"].hex() == git.stdout.decode().strip()
    assert extra["md5"] == hashlib.md5(CONTENT).digest()
    assert extra["sha1"] == hashlib.sha1(CONTENT).digest()
    assert extra["crc32c"] == crc32c.crc32c(CONTENT).to_bytes(4, "big")
    assert extra["crc32"] == zlib.crc32(CONTENT).to_bytes(4, "big")


def test_another_length_than_announced_is_noticed():
    hasher = ContentHasher(10)
    hasher.update(memoryview(b"123456789"))
    with pytest.raises(ChecksumMismatch, match="9 of 10"):
        hasher.result()
    with pytest.raises(ChecksumMismatch, match="10 bytes"):
        hasher.update(memoryview(b"01"))


def test_an_unknown_checksum_is_refused_at_once():
    with pytest.raises(ValueError, match="crc64"):
        ContentHasher(1, ["crc64"])


def test_the_snapshot_digest_is_that_of_the_sorted_lines_in_any_order_given():
    files = [("b" * 64, 3, "a"), ("a" * 64, 10, "z/ü"), ("a" * 64, 9, "b")]
    lines = sorted(f"{sha} {size} {path}\n".encode() for sha, size, path in files)
    assert snapshot_digest(files) == hashlib.sha256(b"".join(lines)).hexdigest()
    assert snapshot_digest(reversed(files)) == snapshot_digest(files)
    assert snapshot_digest([]) == hashlib.sha256(b"").hexdigest()
