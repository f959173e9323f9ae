import threading

import pytest

from modelcache_server.arena import Arena
from modelcache_server.cache import BlockCache, BlockKey
from modelcache_server.errors import Reason, RequestError
from modelcache_volume import BLOCK_BYTES
from support.server_volume import wait_until

SLOTS = 4


@pytest.fixture
def cache():
    arena = Arena(SLOTS * BLOCK_BYTES)
    cache = BlockCache(arena)
    yield cache
    assert cache.occupancy()[1] == 0, "a pin was left"
    cache.close()
    arena.close()


def key(number: int) -> BlockKey:
    return BlockKey(b"s" * 32, number)


def filled_with(byte: int):
    def load(view: memoryview) -> None:
        view[:] = bytes([byte]) * len(view)

    return load


def never(view: memoryview) -> None:
    raise AssertionError("must not be loaded")


def read(cache: BlockCache, number: int, *, length: int = 8, load=None) -> bytes:
    with cache.pin(key(number), length, load or filled_with(number), timeout=5) as pin:
        return bytes(pin.view)


def test_a_block_is_loaded_once_and_then_found(cache):
    assert read(cache, 1) == b"\1" * 8
    assert read(cache, 1, load=never) == b"\1" * 8
    assert (cache.counters.misses, cache.counters.hits) == (1, 1)


def test_a_hundred_readers_of_a_cold_block_load_it_once(cache):
    loads = []
    gate = threading.Event()

    def load(view):
        loads.append(1)
        assert gate.wait(10)
        view[:] = b"x" * len(view)

    seen = []
    threads = [threading.Thread(target=lambda: seen.append(read(cache, 1, load=load))) for _ in range(100)]
    for thread in threads:
        thread.start()
    wait_until(lambda: cache._entries and cache._entries[key(1)].pins == 100, "not all wait")
    gate.set()
    for thread in threads:
        thread.join()
    assert loads == [1]
    assert seen == [b"x" * 8] * 100


def test_a_failed_load_is_told_to_all_who_wait_and_leaves_nothing(cache):
    gate = threading.Event()

    def fail(view):
        view[:] = b"!" * len(view)
        assert gate.wait(10)
        raise OSError("the disk is gone")

    errors = []

    def attempt():
        try:
            read(cache, 1, load=fail)
        except OSError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: cache._entries and cache._entries[key(1)].pins == 5, "not all wait")
    gate.set()
    for thread in threads:
        thread.join()
    assert errors == ["the disk is gone"] * 5
    assert cache.occupancy() == (0, 0)
    assert read(cache, 1) == b"\1" * 8


def test_an_interrupted_load_leaves_nothing_either(cache):
    def interrupted(view):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(cache, 1, load=interrupted)
    assert cache.occupancy() == (0, 0)


def test_no_more_blocks_than_slots_are_held(cache):
    for number in range(50):
        assert read(cache, number, length=BLOCK_BYTES)[:1] == bytes([number])
    assert cache.occupancy() == (SLOTS, 0)
    assert cache.counters.evictions == 50 - SLOTS


def test_a_pinned_block_keeps_its_bytes_whatever_is_loaded(cache):
    with cache.pin(key(200), 8, filled_with(200), timeout=1) as pin:
        for number in range(50):
            read(cache, number)
        assert bytes(pin.view) == bytes([200]) * 8


def test_pinned_bytes_cannot_be_written(cache):
    with cache.pin(key(1), 8, filled_with(1), timeout=1) as pin, pytest.raises(TypeError):
        pin.view[0] = 0


def test_when_all_slots_are_pinned_a_reader_waits_a_bounded_time(cache):
    pins = [cache.pin(key(number), 8, filled_with(number), timeout=1) for number in range(SLOTS)]
    with pytest.raises(RequestError) as caught:
        cache.pin(key(99), 8, never, timeout=0.05)
    assert caught.value.reason is Reason.RESOURCE_EXHAUSTED
    assert caught.value.retry_after
    for pin in pins:
        pin.release()


def test_a_reader_that_waits_for_a_slot_gets_the_first_that_is_free(cache):
    pins = [cache.pin(key(number), 8, filled_with(number), timeout=1) for number in range(SLOTS)]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(read(cache, 99)))
    thread.start()
    wait_until(lambda: cache._waiting_for_slot, "does not wait")
    pins.pop().release()
    thread.join(5)
    assert seen == [bytes([99]) * 8]
    for pin in pins:
        pin.release()


def test_a_reader_does_not_wait_for_ever_for_another_ones_load(cache):
    gate = threading.Event()
    loader = threading.Thread(target=read, args=(cache, 1), kwargs={"load": lambda view: gate.wait(10)})
    loader.start()
    wait_until(lambda: cache.occupancy()[0], "does not load")
    with pytest.raises(RequestError) as caught:
        cache.pin(key(1), 8, never, timeout=0.05)
    assert caught.value.reason is Reason.RESOURCE_EXHAUSTED
    gate.set()
    loader.join()


def test_loading_ahead_needs_no_reader_and_never_waits(cache):
    assert cache.load_ahead(key(1), 8, filled_with(1))
    assert not cache.load_ahead(key(1), 8, never)
    assert read(cache, 1, load=never) == b"\1" * 8
    pins = [cache.pin(key(number), 8, filled_with(number), timeout=1) for number in range(10, 10 + SLOTS)]
    assert not cache.load_ahead(key(2), 8, never)
    for pin in pins:
        pin.release()


def test_the_arena_is_exactly_as_large_as_asked_and_says_what_it_takes():
    arena = Arena(SLOTS * BLOCK_BYTES)
    try:
        assert arena.slots == SLOTS
        arena.slot(1)[:] = b"x" * BLOCK_BYTES
        resident, huge = arena.page_use()
        assert BLOCK_BYTES <= resident <= arena.size
        assert 0 <= huge <= resident
        arena.prefault()
        assert arena.page_use()[0] == arena.size
        assert arena.slot(1)[:1] == b"x"
        with pytest.raises(IndexError):
            arena.slot(SLOTS)
    finally:
        arena.close()


@pytest.mark.parametrize("size", [0, -BLOCK_BYTES, BLOCK_BYTES + 1])
def test_an_arena_of_no_whole_number_of_slots_is_refused(size):
    with pytest.raises(ValueError, match="slots"):
        Arena(size)
