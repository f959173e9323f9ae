"""A model four times as large as the memory that the process may use, against others who can run it there."""

import os
import statistics

from bench.measure import Pair, interleaved
from bench.registry import NotMeasurable, Row, Run, benchmark
from bench.setting import ServedBert
from bench.worker import Worker, together
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


def _bound(tokens: int) -> Row:
    name = f"client.limited.1x{tokens}"
    return Row(name, unit="s", better="lower", goal=1.6, issue=4, or_else=f"{name}.of_both")


def _of_both(tokens: int) -> Row:
    """What a machine can do at all whose cores receive, serve and compute.

    The larger of transfer and plain forward takes it for granted that the other costs nothing. On two cores each of
    them fills both: an unlimited pass and a transfer of the same bytes, two programs that wait for nothing of each
    other, then take the sum of both.
    """
    return Row(f"client.limited.1x{tokens}.of_both", unit="s", better="lower", goal=1.1, issue=4)


# With few tokens, the transfer takes longer than the layers compute; with many it is the other way round.
BOUND = {tokens: (_bound(tokens), _of_both(tokens)) for tokens in (16, 128)}
MMAP = Row("client.limited.mmap", unit="s", better="lower", goal=0.5, issue=4)
DISK = Row("client.limited.accelerate", unit="s", better="lower", goal=0.5, issue=4)


@benchmark(*BOUND[16])
def few_tokens(run: Run) -> dict[str, Pair]:
    """Passes after the first of 16 tokens, in the cgroup, against transfer alone and plain forward without limit."""
    return _against_bound(run, 16)


@benchmark(*BOUND[128])
def many_tokens(run: Run) -> dict[str, Pair]:
    """The same with 128 tokens."""
    return _against_bound(run, 128)


@benchmark(MMAP)
def mapped(run: Run) -> dict[str, Pair]:
    """Passes after the first of 16 tokens, each side in such a cgroup of its own, page cache cold at its start.

    transformers maps the file, and the kernel reads it from this machine's disk again and again; ours reads from a
    server on this machine that holds the model in memory.
    """
    bert = _served(run)
    return {MMAP.name: _against(bert, "mmap")}


@benchmark(DISK)
def offloaded(run: Run) -> dict[str, Pair]:
    """The same against accelerate, which keeps all layers on disk and reads each when it is called."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise NotMeasurable("accelerate is not installed (pip install 'modelcache[bench]')") from error
    bert = _served(run)
    return {DISK.name: _against(bert, "disk")}


def _served(run: Run) -> ServedBert:
    bert = ServedBert.serve(run, MODEL)
    assert bert.size >= 4 * LIMIT_BYTES
    return bert


def _against_bound(run: Run, tokens: int) -> dict[str, Pair]:
    bert = _served(run)
    plain = ("client_forward", "steady", "1", str(tokens), "2", "plain", bert.folder)
    # Where others need the cores too, threads that wait for each other asleep are the faster ones.
    at_once = run.closing.enter_context(Worker(*plain, env={"OMP_WAIT_POLICY": "passive"}))
    transfers = [bert.worker("client_forward", "transfer", "1", "16", count, "stream", bert.address) for count in "12"]
    values = interleaved(
        {
            "ours": lambda: _in_cgroup("stream", bert.address, tokens),
            "plain": bert.worker(*plain).measure,
            "transfer_1": transfers[0].measure,
            "transfer_2": transfers[1].measure,
            "both_1": lambda: together(at_once, transfers[0]),
            "both_2": lambda: together(at_once, transfers[1]),
        },
        rounds=run.rounds(3),
    )
    median = {side: statistics.median(each) for side, each in values.items()}
    slower = max(median["plain"], min(median["transfer_1"], median["transfer_2"]))
    both = values[min(("both_1", "both_2"), key=median.__getitem__)]
    row, of_both = BOUND[tokens]
    return {row.name: Pair(values["ours"], (slower,) * run.rounds(3)), of_both.name: Pair(values["ours"], both)}


def _against(bert: ServedBert, side: str) -> Pair:
    def cold() -> float:
        _forget_pages(bert)
        return _in_cgroup(side, str(bert.folder), 16)

    values = interleaved(
        {"ours": lambda: _in_cgroup("stream", bert.address, 16), "peer": cold}, rounds=bert.run.rounds(3), warmup=0
    )
    return Pair(values["ours"], values["peer"])


def _in_cgroup(side: str, where: str, tokens: int) -> float:
    """Seconds of a pass in a new process."""
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
    """Drops the file from the page cache. In the cgroup not a fourth of it fits, so each pass reads it anew."""
    descriptor = os.open(bert.weights, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
