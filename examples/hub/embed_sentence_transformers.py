"""Embed sentences with plain sentence-transformers: nothing here knows of ModelCache.

    export HF_ENDPOINT=http://minilm-weights:8080     # or what `modelcache up` printed
    python examples/hub/embed_sentence_transformers.py

The revision is asked for once, so that everything is loaded from one commit, whatever moves meanwhile.
"""

import argparse
import sys

from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

SENTENCES = ["A model is fetched once and served to every pod.", "Weights are shared by all containers."]


def main() -> int:
    """Load, embed, compare; 1 when local loading gives something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="default: %(default)s")
    parser.add_argument("--compare-with", metavar="DIR", help="the same model's files")
    arguments = parser.parse_args()

    commit = HfApi().model_info(arguments.model).sha
    embeddings = SentenceTransformer(arguments.model, revision=commit, device="cpu").encode(SENTENCES)
    print(f"{arguments.model} at {commit}: cosine similarity {float(embeddings[0] @ embeddings[1]):.3f}")
    if arguments.compare_with is None:
        return 0
    local = SentenceTransformer(arguments.compare_with, device="cpu").encode(SENTENCES)
    equal = bool((embeddings == local).all())
    print(f"equal to local loading: {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
