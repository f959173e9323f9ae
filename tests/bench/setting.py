"""What most rows need: seeded BERT weights on this disk, and served warm by a process of its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bench.registry import Run
from bench.worker import Worker
from support.models import BASE, BertFiles, cached_bert
from support.processes import Child
from support.serving import ServerProcess, fetch_folder


@dataclass(frozen=True)
class ServedBert:
    """The weights, and how to reach them.

    Attributes:
        run: what starts and ends everything.
        folder: with config.json and model.safetensors, for peers.
        address: of the warm weight server.
    """

    run: Run
    folder: Path
    address: str

    @classmethod
    def serve(cls, run: Run, config: Mapping[str, Any] = BASE) -> "ServedBert":
        """Make, fetch and serve them; the server ends with the run.

        The volume is on this machine, and clients would map it: here the wire is measured.

        Args:
            run: what starts and ends everything.
            config: what differs from BERT-base.
        """
        os.environ.setdefault("MODELCACHE_VOLUME", "off")
        folder = cached_bert(BertFiles(config=config, data_offset=32))
        fetch_folder(folder, run.folder / "volume", "bench")
        # The default, or more: all of it stays in the server's cache, and an eighth is free.
        cache_mib = max(1024, (folder / "model.safetensors").stat().st_size * 9 // 8 // 2**22 * 4)
        server = run.closing.enter_context(ServerProcess.over(run.folder / "volume", "--cache-size", f"{cache_mib}Mi"))
        return cls(run, folder, server.address)

    @property
    def weights(self) -> Path:
        """The weight file."""
        return self.folder / "model.safetensors"

    @property
    def published(self) -> Path:
        """The same file on the server's volume."""
        (found,) = (self.run.folder / "volume").glob("hub/*/snapshots/*/model.safetensors")
        return found

    @property
    def size(self) -> int:
        """The weight file's size in bytes."""
        return self.weights.stat().st_size

    def weights_mib(self, prefix: str) -> float:
        """Size of the tensors whose names start so, in MiB."""
        with safe_open(self.weights, framework="pt") as weights:
            return sum(weights.get_tensor(name).nbytes for name in weights.keys() if name.startswith(prefix)) / 2**20  # noqa: SIM118 - no dict

    def peer(self, name: str) -> str:
        """Start `bench.peers.NAME` over the weight file; its port."""
        child = self.run.closing.enter_context(Child.module(f"bench.peers.{name}", self.weights))
        return child.wait_for(r"^port (\d+)$")[1]

    def worker(self, name: str, *arguments: str | Path) -> Worker:
        """Start `bench.workers.NAME`; it ends with the run."""
        return self.run.closing.enter_context(Worker(name, *arguments))
