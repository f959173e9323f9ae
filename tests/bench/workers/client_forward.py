"""Forward passes of a BERT: WHAT BATCH TOKENS THREADS SIDE WHERE.

WHAT is first (make the model, run it once), cold (the same in memory never touched before), steady3 (run one that keeps
3 layers), steady (one that keeps all), transfer (only read all weights, over as many connections as THREADS says) or
bytes (received in a pass with 3 layers, by those of all layers). SIDE is stream (WHERE is an address) or plain (WHERE
is a folder).
"""

import sys
import time

import torch
from transformers import BertModel

import modelcache
from bench.worker import answer
from modelcache import StreamingBertModel, process


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def share_per_pass(model: StreamingBertModel, tokens: torch.Tensor) -> float:
    blocks = sum(each.layout.wire_bytes for each in model._session.cache.blocks.values())
    before = model.get_inference_stats()["bytes_received"]
    for _ in range(4):
        model(tokens)
    return (model.get_inference_stats()["bytes_received"] - before) / 4 / blocks


def first(load, tokens: torch.Tensor) -> float:
    made = []
    taken = seconds(lambda: made.append(load()) or made[0](tokens))
    if isinstance(made[0], StreamingBertModel):
        made[0].cleanup()
    return taken


@torch.inference_mode()
def main() -> None:
    what, batch, length, threads, side, where = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tokens = torch.arange(int(length)).expand(int(batch), -1)
    cache_size = 3 if what in {"steady3", "bytes"} else None
    process.pool.keep_bytes = 0 if what == "cold" else 2**32

    def load():
        if side == "stream":
            return StreamingBertModel("bench", cache_size, address=where)
        return BertModel.from_pretrained(where)

    if what in {"first", "cold"}:
        answer(lambda: first(load, tokens))
    elif what == "transfer":
        options = {"address": where, "connections": int(threads), "progress": False}
        answer(lambda: seconds(lambda: modelcache.load_state_dict("bench", **options)))
    else:
        model = load()
        model(tokens)
        answer(lambda: share_per_pass(model, tokens) if what == "bytes" else seconds(lambda: model(tokens)))


if __name__ == "__main__":
    main()
