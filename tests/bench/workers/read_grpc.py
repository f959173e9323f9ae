"""Seconds to receive a whole file from the tuned grpcio peer: PORT SIZE."""

import sys
import time

from bench.memory import keep_freed_memory, prefaulted
from bench.peers import grpc_bytes
from bench.worker import answer


def main() -> None:
    port, size = map(int, sys.argv[1:])
    keep_freed_memory()
    memory = prefaulted(size)
    with grpc_bytes.connect(port) as channel:

        def measure() -> float:
            start = time.perf_counter()
            grpc_bytes.read(channel, 0, memory)
            return time.perf_counter() - start

        answer(measure)


if __name__ == "__main__":
    main()
