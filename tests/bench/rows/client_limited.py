"""A model four times as large as the memory that the process may use, against others who can run it there."""

import os
import statistics

from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, Run, benchmark
from bench.setting import ServedBert
from bench.worker import Worker
from support.cgroups import MemoryCgroup, NoCgroups

LIMIT_BYTES = 512 * 2**20
# 43 layers of 48 MiB, 2 GiB in all.
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 43,
    "vocab_size": 1000,
}

# By tokens. With few, the transfer takes longer than the layers compute; with many it is the other way round.
BOUND = {tokens: Row(f"client.limited.1x{tokens}", unit="s", better="lower", goal=1.6, issue=4) for tokens in (16, 128)}
MMAP = Row("client.limited.mmap", unit="s", better="lower", goal=0.5, issue=4)
DISK = Row("client.limited.accelerate", unit="s", better="lower", goal=0.5, issue=4)


@benchmark(*BOUND.values())
def bound(run: Run) -> dict[str, Pair]:
    """Passes after the first, in the cgroup, against the larger of transfer alone and plain forward without limit."""
    bert = _served(run)
    return {row.name: _against_bound(bert, tokens) for tokens, row in BOUND.items()}


@benchmark(MMAP, DISK)
def others(run: Run) -> dict[str, Pair]:
    """Passes after the first of 16 tokens, each side in such a cgroup of its own, page cache cold at its start.

    transformers maps the file, and the kernel reads it again and again; accelerate keeps all layers on disk and reads
    each when it is called. Both read this machine's disk, ours a server on it that holds the model in memory.
    """
    bert = _served(run)
    sides = {"stream": bert.address, "mmap": str(bert.folder)}
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise NotMeasurable("accelerate is not installed (pip install 'modelcache[bench]')") from error
    sides["disk"] = str(bert.folder)
    values = interleaved(
        {side: lambda side=side, where=where: _in_cgroup(bert, side, where, 16) for side, where in sides.items()},
        rounds=run.rounds(3),
        warmup=0,
    )
    return {MMAP.name: Pair(values["stream"], values["mmap"]), DISK.name: Pair(values["stream"], values["disk"])}


def _served(run: Run) -> ServedBert:
    bert = ServedBert.serve(run, MODEL)
    assert bert.size >= 4 * LIMIT_BYTES
    return bert


def _against_bound(bert: ServedBert, tokens: int) -> Pair:
    rounds = bert.run.rounds(3)
    ours = tuple(_in_cgroup(bert, "stream", bert.address, tokens) for _ in range(rounds))
    with (
        Worker("client_limited", "-", "plain", bert.folder, str(tokens)) as plain,
        Worker("client_forward", "transfer", "1", "16", "2", "stream", bert.address) as transfer,
    ):
        values = interleaved({"plain": plain.measure, "transfer": transfer.measure}, rounds=rounds)
    # Not in the rounds of ours: what the plain side has mapped would lie in the page cache, outside of any limit.
    slower = max(statistics.median(each) for each in values.values())
    return Pair(ours, (slower,) * rounds)


def _in_cgroup(bert: ServedBert, side: str, where: str, tokens: int) -> float:
    """Seconds of a pass in a new process."""
    _forget_pages(bert)
    try:
        with MemoryCgroup.limited(LIMIT_BYTES) as group:
            with Worker("client_limited", group.processes, side, where, str(tokens)) as worker:
                seconds = worker.measure()
            if group.oom_kills():
                raise RuntimeError(f"{side} was killed for its memory")
    except NoCgroups as error:
        raise NotMeasurable(f"cgroups are not available: {error}") from error
    return seconds


def _forget_pages(bert: ServedBert) -> None:
    descriptor = os.open(bert.weights, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
