"""Bytes are received once, checked, and fetched again where they broke or were damaged."""

import random

import pytest
from crc32c import crc32c

from modelcache.deadline import Deadline
from modelcache.errors import IntegrityError, Unavailable
from modelcache.lane import CorruptAtServer, LaneBroken
from modelcache.plan import BLOCK_BYTES, Stored, lay_out
from modelcache.reader import read_run

CONTENT = random.Random(0).randbytes(13 * 2**20)


def stored(name, offset, length):
    marks = [*range(BLOCK_BYTES, length, BLOCK_BYTES), length]
    crc = tuple(crc32c(CONTENT[offset : offset + mark]) for mark in marks)
    return Stored(name, "U8", (length,), None, "f", offset, length, crc)


class Stream:
    def __init__(self, data, fails_after):
        self.data, self.fails_after = memoryview(data), fails_after
        self.closed = self.discarded = False

    def read_into(self, view):
        if self.fails_after is not None and self.fails_after <= 0:
            raise LaneBroken("cut")
        count = min(len(view), len(self.data), 700_001, self.fails_after or 2**40)
        view[:count] = self.data[:count]
        self.data = self.data[count:]
        if self.fails_after is not None:
            self.fails_after -= count
        return count

    def close(self):
        self.closed = True

    def discard(self):
        self.discarded = True


class Source:
    """Serves CONTENT; `cuts` says after how many bytes each stream fails, `damage` which bytes it flips."""

    def __init__(self, cuts=(), damage=(), errors=()):
        self.cuts, self.damage, self.errors = list(cuts), [dict.fromkeys(each) for each in damage], list(errors)
        self.asked, self.streams, self.blamed = [], [], 0

    def open(self, path, offset, length, deadline):
        deadline.remaining()
        self.asked.append((offset, length))
        if self.errors:
            raise self.errors.pop(0)
        data = bytearray(CONTENT[offset : offset + length])
        for each in self.damage.pop(0) if self.damage else ():
            if offset <= each < offset + length:
                data[each - offset] ^= 1
        self.streams.append(Stream(data, self.cuts.pop(0) if self.cuts else None))
        return self.streams[-1]

    def blame(self, error):
        self.blamed += 1


TENSORS = [stored("a", 100, 5_000_000), stored("b", 5_000_100, 17), stored("c", 5_001_000, 7_000_000)]


def read(source, tensors=TENSORS, seconds=5.0):
    layout = lay_out(tensors, run_bytes=2**30)
    memory = memoryview(bytearray(layout.nbytes))
    received = sum(read_run(source, run, memory, Deadline(seconds)) for run in layout.runs)
    for each in tensors:
        start = layout.offsets[each.place]
        assert memory[start : start + each.length] == CONTENT[each.offset : each.offset + each.length]
    return received


def test_a_run_is_one_request_whose_connection_can_be_used_again():
    source = Source()
    assert read(source) == 12_000_900
    assert source.asked == [(100, 12_000_900)]
    assert source.streams[0].closed


def test_a_broken_stream_goes_on_where_it_broke():
    source = Source(cuts=[3_000_000, 6_000_000])
    assert read(source) == 12_000_900
    assert [offset for offset, _ in source.asked] == [100, 3_000_100, 9_000_100]
    assert all(stream.discarded for stream in source.streams[:2])


def test_damaged_bytes_are_read_again_from_the_last_good_point():
    source = Source(damage=[[100 + BLOCK_BYTES + 5]])
    read(source)
    assert [offset for offset, _ in source.asked] == [100, 100 + BLOCK_BYTES]
    assert source.blamed == 1


def test_damage_and_breaks_together_still_give_the_right_bytes():
    read(Source(cuts=[1_000_000, None, 4_000_000], damage=[[200], [2_000_000], [9_000_000]]))


def test_bytes_that_differ_twice_are_an_error_that_names_tensor_and_file():
    source = Source(damage=[[5_001_005]] * 2)
    with pytest.raises(IntegrityError, match="'c' of f") as caught:
        read(source)
    assert (caught.value.tensor, caught.value.path) == ("c", "f")


def test_a_server_that_knows_of_damage_is_asked_twice():
    source = Source(errors=[CorruptAtServer("bad"), CorruptAtServer("bad")])
    with pytest.raises(IntegrityError, match=r"modelcache fetch --verify"):
        read(source)


def test_no_server_until_the_deadline_is_one_clear_error():
    with pytest.raises(Unavailable, match=r"within 0\.3 s.*refused"):
        read(Source(errors=[LaneBroken("refused")] * 10_000), seconds=0.3)
