"""Memory is aligned, used again, and never while a tensor still looks at it."""

import gc

import torch

from modelcache.buffers import SlabPool

MIB = 2**20


def address(lease):
    return torch.frombuffer(lease.array, dtype=torch.uint8).data_ptr()


def test_a_slab_starts_on_a_huge_page():
    assert address(SlabPool().take(3 * MIB)) % (2 * MIB) == 0


def test_a_slab_is_used_again_once_nothing_looks_at_it():
    pool = SlabPool()
    lease = pool.take(4 * MIB)
    first = address(lease)
    del lease
    assert address(pool.take(4 * MIB)) == first


def test_a_slab_is_not_used_again_while_a_tensor_looks_at_it():
    pool = SlabPool()
    lease = pool.take(4 * MIB)
    view = torch.frombuffer(lease.array, dtype=torch.uint8, count=10, offset=64)[2:5]
    view.fill_(7)
    del lease
    gc.collect()
    other = pool.take(4 * MIB)
    torch.frombuffer(other.array, dtype=torch.uint8).fill_(1)
    assert view.tolist() == [7, 7, 7]
    assert pool.used_bytes == 8 * MIB


def test_a_parameter_keeps_its_slab():
    pool = SlabPool()
    parameter = torch.nn.Parameter(torch.frombuffer(pool.take(2 * MIB).array, dtype=torch.float32, count=8))
    assert pool.used_bytes == 2 * MIB
    del parameter
    assert pool.used_bytes == 0


def test_bytes_are_counted():
    pool = SlabPool()
    lease = pool.take(3 * MIB)
    assert (pool.used_bytes, pool.free_bytes) == (4 * MIB, 0)
    del lease
    assert (pool.used_bytes, pool.free_bytes) == (0, 4 * MIB)


def test_free_slabs_above_the_limit_go_back_to_the_system():
    pool = SlabPool(keep_bytes=4 * MIB)
    leases = [pool.take(2 * MIB) for _ in range(4)]
    del leases
    assert pool.free_bytes == 4 * MIB
    pool.trim()
    assert pool.free_bytes == 0


def test_reserved_memory_is_what_is_taken_next():
    pool = SlabPool()
    pool.reserve(8 * MIB, 4 * MIB)
    leases = [pool.take(4 * MIB) for _ in range(2)]
    assert pool.free_bytes == 0
    assert all(lease.nbytes == 4 * MIB for lease in leases)


def test_a_much_larger_slab_is_left_for_larger_things():
    pool = SlabPool()
    pool.reserve(64 * MIB, 64 * MIB)
    assert pool.take(2 * MIB).nbytes == 2 * MIB
