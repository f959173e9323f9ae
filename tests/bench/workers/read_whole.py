"""Seconds of `modelcache.load_state_dict`, every checksum checked: ADDRESS SIZE."""

import sys
import time

import modelcache
from bench.worker import answer
from modelcache import process
from modelcache.connection import connect


def main() -> None:
    address, size = sys.argv[1], int(sys.argv[2])
    # A program that loads once has its memory prefaulted or not; what is compared here is the transfer.
    process.pool.keep_bytes = 2 * size

    # As another model of the same server in the process would: the peers' connections are open beforehand too.
    open_already = connect("", address=address)

    def measure() -> float:
        start = time.perf_counter()
        weights = modelcache.load_state_dict(address=address, progress=False)
        seconds = time.perf_counter() - start
        del weights
        return seconds

    with open_already:
        answer(measure)


if __name__ == "__main__":
    main()
