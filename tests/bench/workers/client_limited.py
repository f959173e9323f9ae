"""Seconds of a BERT's forward pass under a memory limit: PROCESSES SIDE WHERE TOKENS.

PROCESSES is the file by which a cgroup is entered before anything large is imported. SIDE is stream (keeping one layer;
WHERE is an address), mmap (transformers over a mapped file; WHERE is a folder) or disk (accelerate, all layers on
disk). The first pass is not measured; of three more, the median is the value.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.worker import answer


def load(side: str, where: str, offload_folder: str):
    if side == "stream":
        from modelcache import StreamingBertModel

        return StreamingBertModel("bench", 1, address=where)
    from transformers import BertModel

    if side == "disk":
        devices = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
        return BertModel.from_pretrained(where, device_map=devices, offload_folder=offload_folder)
    return BertModel.from_pretrained(where)


def main() -> None:
    processes, side, where, count = sys.argv[1:]
    Path(processes).write_text("0")
    import torch

    tokens = torch.arange(int(count)).reshape(1, -1)

    def seconds() -> float:
        start = time.perf_counter()
        model(tokens)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as offload_folder, torch.inference_mode():
        model = load(side, where, offload_folder)
        seconds()
        answer(lambda: statistics.median(seconds() for _ in range(3)))


if __name__ == "__main__":
    main()
