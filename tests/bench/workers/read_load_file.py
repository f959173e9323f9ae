"""Seconds of safetensors' `load_file`, all pages touched: FILE."""

import sys
import time

import torch
from safetensors.torch import load_file

from bench.memory import touch
from bench.worker import answer


def main() -> None:
    path = sys.argv[1]
    torch.set_num_threads(1)

    def measure() -> float:
        start = time.perf_counter()
        weights = load_file(path)
        touch(weights.values())
        taken = time.perf_counter() - start
        del weights
        return taken

    answer(measure)


if __name__ == "__main__":
    main()
