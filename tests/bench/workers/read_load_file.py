"""Seconds of safetensors' `load_file`, all bytes touched: FILE.

load_file maps the file; only reading its pages brings them into memory, so one byte of each is read.
"""

import sys
import time

import torch
from safetensors.torch import load_file

from bench.worker import answer

PAGE = 4096


def main() -> None:
    path = sys.argv[1]
    torch.set_num_threads(1)

    def measure() -> float:
        start = time.perf_counter()
        for tensor in load_file(path).values():
            tensor.view(-1).view(torch.uint8)[::PAGE].sum()
        return time.perf_counter() - start

    answer(measure)


if __name__ == "__main__":
    main()
