"""Reads a file in ranges over one lane with some connections at once: a JSON object with the fields of `Task`.

Measures GB/s of all connections together ("rate"), CPU seconds per GB of both ends ("cpu"), or how many times longer
the slowest connection takes than the median one ("slowest").
"""

import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.lanes import Read, Target, open_lane
from bench.memory import keep_freed_memory, prefaulted
from bench.worker import answer


@dataclass(frozen=True)
class Task:
    """What to read, and what of it to measure."""

    target: Target
    size: int
    range_bytes: int
    connections: int
    measure: str
    server_pid: int


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_share(read: Read, start: int, end: int, into: memoryview, task: Task, barrier: threading.Barrier) -> float:
    """Seconds for the ranges of [start, end), all into the same memory."""
    barrier.wait()
    began = time.perf_counter()
    for offset in range(start, end, task.range_bytes):
        read(offset, into[: min(task.range_bytes, end - offset)])
    return time.perf_counter() - began


def main() -> None:
    raw = json.loads(sys.argv[1])
    task = Task(target=Target(**raw.pop("target")), **raw)
    keep_freed_memory()
    reads = [open_lane(task.target) for _ in range(task.connections)]
    memory = [prefaulted(task.range_bytes) for _ in reads]
    share = task.size // task.connections

    def measure() -> float:
        barrier = threading.Barrier(task.connections + 1)
        with ThreadPoolExecutor(task.connections) as threads:
            shares = [
                threads.submit(read_share, read, n * share, (n + 1) * share, memory[n], task, barrier)
                for n, read in enumerate(reads)
            ]
            cpu = time.process_time() + cpu_seconds(task.server_pid)
            barrier.wait()
            began = time.perf_counter()
            seconds = [each.result() for each in shares]
            wall = time.perf_counter() - began
        gigabytes = share * task.connections / 1e9
        if task.measure == "slowest":
            return max(seconds) / statistics.median(seconds)
        if task.measure == "cpu":
            return (time.process_time() + cpu_seconds(task.server_pid) - cpu) / gigabytes
        return gigabytes / wall

    answer(measure)


if __name__ == "__main__":
    main()
