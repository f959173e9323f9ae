"""Forward passes of a BERT on 1 x 128 tokens with one torch thread: WHAT SIDE WHERE.

WHAT is first (load the model and run it once), steady (run a loaded one, all layers in memory) or peak (MiB resident at
most, with imports, loading and two passes: for a process that measures once). SIDE is stream (WHERE is an address),
plain (a folder) or, of peak only, imports: nothing is loaded.
"""

import sys
import time
from collections.abc import Callable

import torch
from transformers import BertModel

from bench.memory import peak_resident_bytes
from bench.worker import answer
from modelcache import StreamingBertModel

Model = StreamingBertModel | BertModel
TOKENS = torch.arange(128).reshape(1, 128) + 1000


def first(load: Callable[[], Model]) -> float:
    start = time.perf_counter()
    model = load()
    model(TOKENS)
    seconds = time.perf_counter() - start
    if isinstance(model, StreamingBertModel):
        model.cleanup()
    return seconds


def steady(model: Model) -> float:
    start = time.perf_counter()
    model(TOKENS)
    return time.perf_counter() - start


def peak(model: Model) -> float:
    model(TOKENS)
    model(TOKENS)
    return peak_resident_bytes() / 2**20


@torch.inference_mode()
def main() -> None:
    what, side, where = sys.argv[1:]
    torch.set_num_threads(1)
    cache_size = {"first": 3, "steady": None, "peak": 3}[what]

    def load() -> Model:
        if side == "stream":
            return StreamingBertModel("bench", cache_size=cache_size, address=where)
        return BertModel.from_pretrained(where).eval()

    if what == "first":
        answer(lambda: first(load))
    elif what == "steady":
        model = load()
        model(TOKENS)
        answer(lambda: steady(model))
    elif side == "imports":
        answer(lambda: peak_resident_bytes() / 2**20)
    else:
        answer(lambda: peak(load()))


if __name__ == "__main__":
    main()
