"""What most rows need: BERT-base-size weights on this disk, and served warm by a process of its own."""

import os
from dataclasses import dataclass
from pathlib import Path

from bench.registry import Run
from bench.worker import Worker
from support.models import BASE, BertFiles, cached_bert
from support.processes import Child
from support.serving import ServerProcess, fetch_folder


@dataclass(frozen=True)
class BertBase:
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
    def serve(cls, run: Run) -> "BertBase":
        """Make, fetch and serve them; the server ends with the run.

        The volume is on this machine, and clients would map it: here the wire is measured.
        """
        os.environ.setdefault("MODELCACHE_VOLUME", "off")
        folder = cached_bert(BertFiles(config=BASE, data_offset=32))
        fetch_folder(folder, run.folder / "volume", "bench")
        server = run.closing.enter_context(ServerProcess.over(run.folder / "volume"))
        return cls(run, folder, server.address)

    @property
    def weights(self) -> Path:
        """The weight file."""
        return self.folder / "model.safetensors"

    @property
    def size(self) -> int:
        """The weight file's size in bytes."""
        return self.weights.stat().st_size

    def peer(self, name: str) -> str:
        """Start `bench.peers.NAME` over the weight file; its port."""
        child = self.run.closing.enter_context(Child.module(f"bench.peers.{name}", self.weights))
        return child.wait_for(r"^port (\d+)$")[1]

    def worker(self, name: str, *arguments: str | Path) -> Worker:
        """Start `bench.workers.NAME`; it ends with the run."""
        return self.run.closing.enter_context(Worker(name, *arguments))
