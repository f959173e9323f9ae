"""Embed sentences with plain transformers, of any version: nothing here knows of ModelCache.

    export HF_ENDPOINT=http://minilm-weights:8080     # or what `modelcache up` printed
    python examples/hub/embed_transformers.py

The revision is asked for once, and everything is loaded from that commit. transformers 5 does so by itself; version 4
asks for `main` file by file, and would take some of each if the cache moved to a new revision meanwhile.
"""

import argparse
import sys

import torch
from huggingface_hub import HfApi
from transformers import AutoModel, AutoTokenizer

SENTENCES = ("A model is fetched once and served to every pod.", "The cat sleeps on the warm windowsill.")


def embed(name: str, **options: str) -> torch.Tensor:
    """The first token's embedding of each sentence.

    Args:
        name: of a repo, or a local folder.
        options: as `from_pretrained` takes them.

    Returns:
        float, sentences x hidden.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModel.from_pretrained(name, **options).eval()
    with torch.no_grad():
        return model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).last_hidden_state[:, 0]


def main() -> int:
    """Load, embed, compare; 1 when local loading gives something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--compare-with", metavar="DIR", help="the same model's files")
    arguments = parser.parse_args()

    commit = HfApi().model_info(arguments.model, revision=arguments.revision).sha
    embeddings = embed(arguments.model, revision=commit)
    print(f"{arguments.model} at {commit}: {tuple(embeddings.shape)}, norms {embeddings.norm(dim=1).tolist()}")
    if arguments.compare_with is None:
        return 0
    equal = torch.equal(embeddings, embed(arguments.compare_with))
    print(f"torch.equal(from the endpoint, from local files): {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
