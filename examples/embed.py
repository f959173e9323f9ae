"""Embed sentences with a model that is streamed from a weight server: all it knows is the server's address.

The tokenizer's files come over the wire too; no hub is asked.

    modelcache up -f examples/minilm.yaml
    python examples/embed.py --address localhost:9090
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

import modelcache

SENTENCES = (
    "A model is fetched once and served to every pod.",
    "Weights are downloaded a single time and shared by all containers.",
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
)


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 defines them.

    Args:
        hidden: float, batch x tokens x hidden.
        mask: 1 for tokens, 0 for padding, batch x tokens.

    Returns:
        float, batch x hidden, of length 1.
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def print_similarity(embeddings: torch.Tensor) -> None:
    """The cosine similarity of each pair of sentences."""
    similarity = embeddings @ embeddings.T
    print("\nCosine similarity:")
    for number, (sentence, row) in enumerate(zip(SENTENCES, similarity.tolist(), strict=True), start=1):
        print(f"  {number}  " + "  ".join(f"{value:5.2f}" for value in row) + f"   {sentence}")


def print_cache(model: modelcache.StreamingBertModel) -> None:
    """What the streamed model keeps in memory, and what it read."""
    info, stats = model.get_cache_info(), model.get_inference_stats()
    layers = ", ".join(info["cached_components"])
    print(f"\nIn memory after {stats['total_inferences']} passes: {info['memory_usage_mb']:.1f} MiB; of the layers:")
    print(f"  {layers}")
    print(
        f"  layers found in memory {stats['cache_hits']}, read ahead {stats['prefetch_hits']}, waited for "
        f"{stats['cache_misses']}; {stats['bytes_received'] / 2**20:.1f} MiB over {stats['lane']}"
    )


def is_equal(output: Any, folder: Path, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether plain transformers computes the same from local files, bit for bit."""
    reference = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = reference(**inputs)
    return torch.equal(output.last_hidden_state, expected.last_hidden_state) and torch.equal(
        output.pooler_output, expected.pooler_output
    )


def main() -> int:
    """Stream, embed, compare; 1 when transformers computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="minilm", help="name of the ModelCache (default: %(default)s)")
    parser.add_argument("--address", required=True, help="HOST:PORT of the weight server")
    parser.add_argument("--cache-size", type=int, default=3, help="layers kept in memory (default: %(default)s)")
    parser.add_argument("--compare-with", type=Path, metavar="DIR", help="the same model's files, for transformers")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    files = modelcache.snapshot(arguments.name, address=arguments.address, allow_patterns=["*.json", "*.txt"])
    inputs = dict(AutoTokenizer.from_pretrained(files)(SENTENCES, padding=True, return_tensors="pt"))

    begun = time.perf_counter()
    with modelcache.StreamingBertModel(
        arguments.name, address=arguments.address, cache_size=arguments.cache_size
    ) as model:
        output = model(**inputs)
        first = time.perf_counter() - begun
        print(f"First result {first:.2f} s after asking for the model (nothing but its address was known)")
        again = time.perf_counter()
        model(**inputs)
        print(f"Second pass {time.perf_counter() - again:.2f} s, with {arguments.cache_size} layers kept in memory")
        print_similarity(mean_pooled(output.last_hidden_state, inputs["attention_mask"]))
        print_cache(model)

    if arguments.compare_with is None:
        return 0
    equal = is_equal(output, arguments.compare_with, inputs)
    print(f"\ntorch.equal(streamed, transformers from local files): {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
