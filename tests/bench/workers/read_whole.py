"""Seconds of `modelcache.load_state_dict`, every checksum checked: ADDRESS SIZE."""

import sys
import time

import modelcache
from bench.worker import answer
from modelcache import process


def main() -> None:
    address, size = sys.argv[1], int(sys.argv[2])
    # A program that loads once has its memory prefaulted or not; what is compared here is the transfer.
    process.pool.keep_bytes = 2 * size

    def measure() -> float:
        start = time.perf_counter()
        weights = modelcache.load_state_dict(address=address, progress=False)
        seconds = time.perf_counter() - start
        del weights
        return seconds

    answer(measure)


if __name__ == "__main__":
    main()
