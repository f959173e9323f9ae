"""Seconds of tensorizer's read into memory: WEIGHTS FILE URL.

FILE is written first, from the safetensors file WEIGHTS; URL is where it is served.
"""

import sys
import time

from safetensors.torch import load_file
from tensorizer import TensorDeserializer, TensorSerializer

from bench.memory import keep_freed_memory
from bench.worker import answer


def main() -> None:
    weights, file, url = sys.argv[1:]
    serializer = TensorSerializer(file)
    serializer.write_state_dict(load_file(weights))
    serializer.close()
    keep_freed_memory()

    def measure() -> float:
        start = time.perf_counter()
        tensors = TensorDeserializer(url, device="cpu")
        seconds = time.perf_counter() - start
        tensors.close()
        return seconds

    answer(measure)


if __name__ == "__main__":
    main()
