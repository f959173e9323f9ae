"""Milliseconds by which a streamed pass with all layers cached is longer than a plain one, by block: ADDRESS FOLDER."""

import statistics
import sys
import time

import torch
from transformers import BertModel

from bench.measure import interleaved
from bench.worker import answer
from modelcache import StreamingBertModel

TOKENS = torch.arange(16).reshape(1, 16)
PASSES = 30


def seconds(model: StreamingBertModel | BertModel) -> float:
    start = time.perf_counter()
    model(TOKENS)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    address, folder = sys.argv[1:]
    torch.set_num_threads(1)
    streamed, plain = StreamingBertModel("bench", None, address=address), BertModel.from_pretrained(folder)

    def measure() -> float:
        passes = interleaved(
            {"streamed": lambda: seconds(streamed), "plain": lambda: seconds(plain)}, rounds=PASSES, warmup=3
        )
        more = statistics.median(passes["streamed"]) - statistics.median(passes["plain"])
        return more * 1e3 / plain.config.num_hidden_layers

    answer(measure)


if __name__ == "__main__":
    main()
