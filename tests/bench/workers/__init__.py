"""One side of one measurement each, run as a process of its own (see bench.worker)."""
