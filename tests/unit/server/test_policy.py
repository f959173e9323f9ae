from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice

from modelcache_server.policy import EvictionPolicy

Block = tuple[str, int]


def model(name: str, blocks: int) -> list[Block]:
    return [(name, number) for number in range(blocks)]


class Simulated:
    """A cache of keys under the policy."""

    def __init__(self, capacity: int) -> None:
        self.policy: EvictionPolicy[Block] = EvictionPolicy(capacity)
        self.held: set[Block] = set()

    def read(self, key: Block) -> bool:
        if key in self.held:
            self.policy.touch(key)
            return True
        if len(self.held) == self.policy.capacity:
            victim = self.policy.victim(lambda _: True)
            assert victim is not None
            self.held.remove(victim)
        self.held.add(key)
        self.policy.admit(key)
        assert len(self.policy) == len(self.held) <= self.policy.capacity
        return False

    def hits(self, trace: Iterable[Block]) -> float:
        results = [self.read(key) for key in trace]
        return sum(results) / len(results)


def plain_lru_hits(capacity: int, trace: Iterable[Block]) -> float:
    held: OrderedDict[Block, None] = OrderedDict()
    hits = total = 0
    for key in trace:
        total += 1
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            held[key] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return hits / total


def interleaved(*streams: Sequence[Block]) -> list[Block]:
    length = max(len(stream) for stream in streams)
    return list(chain.from_iterable(zip(*(islice(cycle(stream), length) for stream in streams), strict=True)))


def test_a_scan_much_larger_than_the_cache_leaves_what_is_hot():
    cache = Simulated(100)
    hot = model("hot", 70)
    for _ in range(3):
        cache.hits(hot)
    cache.hits(model("terabyte", 5000))
    assert cache.hits(hot) > 0.95
    assert plain_lru_hits(100, hot * 3 + model("terabyte", 5000) + hot) < 2 * 70 / (4 * 70 + 5000) + 0.01


def test_a_model_twice_the_size_of_the_cache_hits_on_the_part_that_stays():
    trace = model("large", 200) * 10
    assert plain_lru_hits(100, trace) == 0
    assert Simulated(100).hits(trace) > 0.35  # at best 0.45: half of nine passes of ten


def test_several_models_streamed_at_once_hit_more_often_than_under_a_plain_lru():
    popular, other, huge = model("popular", 40), model("other", 40), model("huge", 400)
    trace = interleaved(popular, other, huge) * 3
    ours, lru = Simulated(100).hits(trace), plain_lru_hits(100, trace)
    assert lru < 0.6
    assert ours > 0.6
    assert ours > lru + 0.05


def test_a_new_favourite_takes_the_place_of_the_old_one_within_some_passes():
    cache = Simulated(100)
    for _ in range(20):
        cache.hits(model("old", 100))
    for _ in range(25):
        cache.hits(model("new", 100))
    assert cache.hits(model("new", 100)) > 0.8


def test_a_block_read_in_a_thousand_small_pieces_counts_as_used_once():
    cache = Simulated(100)
    for _ in range(3):
        cache.hits(model("hot", 90))
    for block in model("tensors", 300):
        cache.hits([block] * 1000)
    assert cache.hits(model("hot", 90)) > 0.9


def test_retired_blocks_leave_first_and_new_ones_stay():
    cache = Simulated(100)
    old = model("old", 100)
    for _ in range(10):
        cache.hits(old)
    for key in old:
        cache.policy.retire(key)
    cache.hits(model("new", 100))
    assert cache.hits(model("new", 100)) > 0.9


def test_only_what_may_go_is_chosen():
    policy: EvictionPolicy[Block] = EvictionPolicy(4)
    keys = model("m", 4)
    for key in keys:
        policy.admit(key)
    assert policy.victim(lambda key: key == keys[2]) == keys[2]
    assert policy.victim(lambda _: False) is None
    assert len(policy) == 3


def test_blocks_loaded_ahead_are_still_there_when_their_reader_comes():
    cache = Simulated(16)
    for _ in range(3):
        cache.hits(model("hot", 16))
    stream = model("stream", 60)
    for position in range(0, 60, 2):
        for ahead in stream[position : position + 2]:
            victim = cache.policy.victim(lambda _: True)
            assert victim is not None
            cache.held.remove(victim)
            cache.held.add(ahead)
            cache.policy.admit(ahead, used=False)
        assert cache.hits(stream[position : position + 2]) == 1


def test_what_is_remembered_of_blocks_that_left_is_bounded():
    cache = Simulated(16)
    cache.hits(model("endless", 20_000))
    assert len(cache.policy._uses) <= 16 * 16
