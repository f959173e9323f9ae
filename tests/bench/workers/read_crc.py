"""Seconds to compute the CRC-32C of a file that is in memory already, by all cores: FILE."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crc32c import crc32c

from bench.memory import file_in_memory
from bench.worker import answer

STEP_BYTES = 16 << 20


def main() -> None:
    content = file_in_memory(Path(sys.argv[1]))
    parts = [content[start : start + STEP_BYTES] for start in range(0, len(content), STEP_BYTES)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:

        def measure() -> float:
            start = time.perf_counter()
            list(threads.map(crc32c, parts))
            return time.perf_counter() - start

        answer(measure)


if __name__ == "__main__":
    main()
