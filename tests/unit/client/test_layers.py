"""Which layers stay and which are read ahead."""

import pytest

from modelcache.layers import LayerPolicy

NAMES = [f"layer.{index}" for index in range(12)]


class Cache:
    """Runs a policy as ComponentCache does, and counts what is loaded."""

    def __init__(self, **limits):
        self.policy = LayerPolicy(dict.fromkeys(NAMES, 10), **limits)
        self.here = set()
        self.loaded = 0
        self.most = 0

    def drop(self, names):
        for name in names:
            self.here.remove(name)

    def load(self, name):
        if name not in self.here:
            self.here.add(name)
            self.loaded += 1
            self.most = max(self.most, len(self.here))

    def use(self, name, caller=0):
        access = self.policy.acquire(name, caller)
        assert access.hit <= (name in self.here)
        self.drop(self.policy.evictions())
        self.load(name)
        wanted, dropped = self.policy.prefetches()
        self.drop(dropped)
        for each in wanted:
            self.load(each)
        self.policy.release(name)
        self.drop(self.policy.evictions())
        return access

    def one_pass(self, names=NAMES):
        return [self.use(name) for name in names]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_pass_reads_at_most_what_does_not_stay(size, ahead):
    cache = Cache(max_layers=size, ahead=ahead)
    cache.one_pass()
    before = cache.loaded
    for _ in range(12):
        cache.one_pass()
    assert (cache.loaded - before) / 12 <= len(NAMES) - size + 1


@pytest.mark.parametrize("size", [1, 3, 6])
def test_never_more_than_two_layers_on_top_of_the_limit(size):
    cache = Cache(max_layers=size)
    for _ in range(3):
        cache.one_pass()
    assert cache.most <= size + 2


def test_everything_stays_without_a_limit():
    cache = Cache()
    cache.one_pass()
    assert all(access.hit for access in cache.one_pass())
    assert cache.loaded == 12


def test_every_layer_of_a_pass_is_on_its_way_before_it_is_used():
    cache = Cache(max_layers=3)
    cache.policy.prefetches()
    assert all(access.prefetched for access in cache.one_pass()[1:])


def test_prefetched_layers_are_no_hits():
    cache = Cache(max_layers=1)
    cache.one_pass()
    assert not any(access.hit for access in cache.one_pass())


def test_without_reading_ahead_only_what_is_used_is_loaded():
    cache = Cache(max_layers=3, ahead=0)
    cache.one_pass(NAMES[:3])
    assert cache.here == set(NAMES[:3])


def test_the_order_is_learned_where_it_differs_from_the_modules():
    order = NAMES[::-1]
    cache = Cache(max_layers=3)
    cache.one_pass(order)
    cache.one_pass(order)
    third = cache.one_pass(order)
    assert all(access.hit or access.prefetched for access in third)


def test_a_layer_in_use_is_never_evicted():
    policy = LayerPolicy(dict.fromkeys(NAMES, 10), max_layers=1)
    policy.acquire("layer.0", 0)
    policy.acquire("layer.1", 1)
    assert policy.evictions() == []
    policy.release("layer.0")
    assert policy.evictions() == ["layer.0"]


def test_two_users_have_to_release_before_a_layer_goes():
    policy = LayerPolicy(dict.fromkeys(NAMES, 10), max_layers=1)
    for caller in (0, 1):
        policy.acquire("layer.0", caller)
    policy.release("layer.0")
    assert policy.in_use("layer.0")
    policy.release("layer.0")
    assert not policy.in_use("layer.0")


def test_a_smaller_limit_evicts_at_once():
    cache = Cache()
    cache.one_pass()
    cache.policy.max_layers = 2
    assert len(cache.policy.evictions()) == 10


def test_bytes_limit_what_stays():
    cache = Cache(max_bytes=35)
    cache.one_pass()
    assert len(cache.policy.used) == 3
    assert cache.most <= 5


def test_a_layer_larger_than_the_limit_is_still_used_alone():
    cache = Cache(max_bytes=5)
    cache.one_pass()
    assert len(cache.policy.used) == 1
