"""Seconds to receive a whole file from the raw TCP peer: PORT SIZE CONNECTIONS."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from bench.memory import prefaulted
from bench.peers import raw_tcp
from bench.worker import answer


def main() -> None:
    port, size, count = map(int, sys.argv[1:])
    memory = prefaulted(size)
    connections = [raw_tcp.connect(port) for _ in range(count)]
    share = -(-size // count)

    def receive(index: int) -> None:
        raw_tcp.request(connections[index], index * share, memory[index * share : (index + 1) * share])

    with ThreadPoolExecutor(count) as threads:

        def measure() -> float:
            start = time.perf_counter()
            list(threads.map(receive, range(count)))
            return time.perf_counter() - start

        answer(measure)


if __name__ == "__main__":
    main()
