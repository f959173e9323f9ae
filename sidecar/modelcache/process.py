"""What all models of a process share: the memory that weights lie in."""

from __future__ import annotations

from modelcache.buffers import SlabPool

__all__ = ["pool", "reserve_memory"]

pool = SlabPool()


def reserve_memory(nbytes: int, *, slab_bytes: int) -> None:
    """Faults memory in ahead of time, so that the first pass of a model does not pay for it.

    Args:
        nbytes: how much, altogether.
        slab_bytes: of one component (a layer, the embeddings).
    """
    pool.reserve(nbytes, slab_bytes)
