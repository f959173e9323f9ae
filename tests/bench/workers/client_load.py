"""Seconds of `load_state_dict`: ADDRESS CONNECTIONS VERIFY; whether by mmap is up to MODELCACHE_VOLUME."""

import sys
import time

import torch

import modelcache
from bench.memory import touch
from bench.worker import answer
from modelcache import process


def main() -> None:
    address, connections, verify = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "verify"
    process.pool.keep_bytes = 2**31
    torch.set_num_threads(1)

    def measure() -> float:
        start = time.perf_counter()
        weights = modelcache.load_state_dict(address=address, progress=False, connections=connections, verify=verify)
        touch(weights.values())
        taken = time.perf_counter() - start
        del weights
        return taken

    answer(measure)


if __name__ == "__main__":
    main()
