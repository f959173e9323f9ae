import os
import threading

import crc32c
import pytest

from modelcache_server.admission import Admission
from modelcache_server.arena import Arena
from modelcache_server.cache import BlockCache
from modelcache_server.reader import BlockReader, pieces
from modelcache_server.store import BlobStore, ServedFile
from modelcache_volume import BLOCK_BYTES
from support.server_volume import random_bytes, wait_until

BLOCKS = 8
DATA = random_bytes(BLOCKS * BLOCK_BYTES - 5, 1)


@pytest.fixture
def parts(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    loads: list[int] = []
    lock = threading.Lock()

    def observe(tier: str, seconds: float, size: int) -> None:
        with lock:
            loads.append(size)

    arena = Arena(16 * BLOCK_BYTES)
    cache = BlockCache(arena)
    store = BlobStore(observe=observe)
    admission = Admission(16 * BLOCK_BYTES)
    reader = BlockReader(cache, store, admission, read_ahead=4, queue_seconds=5)
    sums = [crc32c.crc32c(DATA[at : at + BLOCK_BYTES]) for at in range(0, len(DATA), BLOCK_BYTES)]
    file = ServedFile("f", len(DATA), b"s" * 32, sums, "here", lambda: os.open(path, os.O_RDONLY), lambda: None)
    yield reader, cache, file, loads
    reader.close()
    assert admission.in_flight == 0
    assert cache.occupancy()[1] == 0
    store.close()
    cache.close()
    arena.close()


def held(cache, file) -> set[int]:
    return {block for block in range(BLOCKS) if file.key(block) in cache}


def lend(reader, file, offset: int, length: int, horizon: int = 0) -> bytes:
    with reader.lend(file, offset, length, client="c", horizon=horizon) as loan:
        return bytes(loan.view)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 0, []),
        (5, 10, [(5, 10)]),
        (BLOCK_BYTES - 1, 2, [(BLOCK_BYTES - 1, 1), (BLOCK_BYTES, 1)]),
        (1, 2 * BLOCK_BYTES, [(1, BLOCK_BYTES - 1), (BLOCK_BYTES, BLOCK_BYTES), (2 * BLOCK_BYTES, 1)]),
    ],
)
def test_ranges_are_cut_at_the_borders_of_blocks(offset, length, expected):
    assert list(pieces(offset, length)) == expected


def test_the_next_blocks_of_a_range_are_loaded_ahead_and_none_beyond_it(parts):
    reader, cache, file, _ = parts
    horizon = reader.horizon(file, 0, 2 * BLOCK_BYTES)
    assert lend(reader, file, 0, 100, horizon) == DATA[:100]
    wait_until(lambda: held(cache, file) == {0, 1}, "not loaded ahead")
    assert lend(reader, file, BLOCK_BYTES, 100, horizon) == DATA[BLOCK_BYTES : BLOCK_BYTES + 100]
    assert held(cache, file) == {0, 1}


def test_ranges_that_follow_each_other_are_loaded_ahead_beyond_their_end(parts):
    reader, cache, file, _ = parts
    for block in (0, 1):
        horizon = reader.horizon(file, block * BLOCK_BYTES, BLOCK_BYTES)
        lend(reader, file, block * BLOCK_BYTES, BLOCK_BYTES, horizon)
    wait_until(lambda: held(cache, file) > {0, 1}, "the sequence was not noticed")


def test_every_block_is_loaded_once_however_it_comes_in(parts):
    reader, _, file, loads = parts
    horizon = reader.horizon(file, 0, len(DATA))
    received = b"".join(lend(reader, file, offset, length, horizon) for offset, length in pieces(0, len(DATA)))
    assert received == DATA
    assert sum(loads) == len(DATA)


def test_a_failed_load_ahead_hurts_nobody_and_the_reader_is_told(parts, caplog):
    reader, cache, file, _ = parts
    file.block_crc32c[1] ^= 1
    horizon = reader.horizon(file, 0, len(DATA))
    assert lend(reader, file, 0, 10, horizon) == DATA[:10]
    wait_until(lambda: not reader._ahead, "still loading")
    assert 1 not in held(cache, file)
    with pytest.raises(Exception, match="not what was published"):
        lend(reader, file, BLOCK_BYTES, 10)
