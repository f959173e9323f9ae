"""The streamed model against plain transformers that loads the same files from the local disk."""

from pathlib import Path

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert
from bench.worker import Worker

FIRST = Row("client.first_forward.bert_base", unit="s", better="lower", goal=1.3, issue=1)
STEADY = Row("client.steady_state.all_cached", unit="s", better="lower", goal=1.05, issue=1)
MEMORY = Row("client.peak_memory.cache3", unit="MiB", better="lower", goal=1.0, issue=1)
BOUND = Row("client.peak_memory.cache3_bound", unit="MiB", better="lower", goal=1.0, issue=4)

_SPARE_MIB = 64


@benchmark(FIRST, STEADY, MEMORY, BOUND)
def bert_base(run: Run) -> dict[str, Pair]:
    """1 x 128 tokens, one torch thread and one process for each side, warm server, warm page cache.

    The bound of memory: embeddings, five layers, the same imports in a process of their own, and 64 MiB.
    """
    bert = ServedBert.serve(run)
    return {
        FIRST.name: _forward(bert, "first", rounds=run.rounds(9)),
        STEADY.name: _forward(bert, "steady", rounds=run.rounds(31)),
        **_peaks(bert, rounds=run.rounds(3)),
    }


def _forward(bert: ServedBert, what: str, *, rounds: int) -> Pair:
    with Worker("forward", what, "stream", bert.address) as ours, Worker("forward", what, "plain", bert.folder) as peer:
        values = interleaved({"ours": ours.measure, "peer": peer.measure}, rounds=rounds, warmup=2)
    return Pair(values["ours"], values["peer"])


def _peaks(bert: ServedBert, *, rounds: int) -> dict[str, Pair]:
    """A process has one peak: each value needs a new one."""

    def once(side: str, where: str | Path) -> float:
        with Worker("forward", "peak", side, where) as worker:
            return worker.measure()

    values = interleaved(
        {
            "ours": lambda: once("stream", bert.address),
            "plain": lambda: once("plain", bert.folder),
            "imports": lambda: once("imports", "-"),
        },
        rounds=rounds,
        warmup=0,
    )
    weights = (bert.weights_mib("embeddings.") + 5 * bert.weights_mib("encoder.layer.0.")) + _SPARE_MIB
    bound = tuple(imports + weights for imports in values["imports"])
    return {MEMORY.name: Pair(values["ours"], values["plain"]), BOUND.name: Pair(values["ours"], bound)}
