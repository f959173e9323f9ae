"""A repo on the small hub, brought onto a volume by a real fetch: what the server's Hub API is tested with."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from modelcache_api.resource import ModelCacheSpec
from modelcache_fetcher import FetchResult, run_fetch
from support.fake_hub import FakeHub, fake_hub
from support.fetching import safetensors_bytes

REPO = "acme/tiny"
NAME = "tiny"
ALL_FILES = {"allowPatterns": ["*"], "ignorePatterns": []}
BLOCK = 4 * 2**20


def hub_files(seed: int = 0) -> dict[str, bytes]:
    """A repo with LFS files (one of more than three blocks), plain and empty ones, and folders."""
    number = str(seed).encode()
    return {
        "README.md": b"# Tiny\n",
        ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "config.json": json.dumps({"model_type": "bert", "seed": seed}).encode(),
        "model.safetensors": safetensors_bytes({"a": 3 * BLOCK + 12345, "b": 64}, fill=b"m" + number * 7 + b"x"),
        "empty.txt": b"",
        "onnx/model.onnx": b"onnx" * 3000 + number,
        "tokenizer/deep/vocab.txt": b"[PAD]\n[UNK]\n" + number,
        "tokenizer/names ü+%.json": b"{}",
    }


def git_oid(content: bytes) -> str:
    """The Git object id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class HubWorld:
    """The hub, the volume, and what each commit has in it.

    Attributes:
        hub: upstream.
        volume: filled by `fetch`.
        commits: files by commit.
    """

    hub: FakeHub
    volume: Path
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main", repo: str = REPO) -> str:
        """A new state upstream."""
        sha = self.hub.commit(repo, files, branch=branch)
        self.commits[sha] = dict(files)
        return sha

    def fetch(self, revision: str = "main", *, repo: str = REPO, name: str = NAME, history: int = 1) -> FetchResult:
        """Bring a revision onto the volume and make it active."""
        spec = {
            "repoId": repo,
            "endpoint": self.hub.url,
            "revision": revision,
            "revisionHistoryLimit": history,
            **ALL_FILES,
        }
        return run_fetch(ModelCacheSpec.model_validate(spec), self.volume, name)


@contextmanager
def hub_world(folder: Path) -> Iterator[HubWorld]:
    """A hub with a folder of its own, and a place for a volume."""
    with fake_hub(folder / "hub") as hub:
        yield HubWorld(hub, folder / "volume")
