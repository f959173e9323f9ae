"""The streamed model against plain transformers that loads the same files from the local disk."""

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import BertBase
from bench.worker import Worker

FIRST = Row("client.first_forward.bert_base", unit="s", better="lower", goal=1.3, issue=1)
STEADY = Row("client.steady_state.all_cached", unit="s", better="lower", goal=1.05, issue=1)
MEMORY = Row("client.peak_memory.cache3", unit="MiB", better="lower", goal=1.0, issue=1)


@benchmark(FIRST, STEADY, MEMORY)
def bert_base(run: Run) -> dict[str, Pair]:
    """1 x 128 tokens, one torch thread and one process for each side, warm server, warm page cache."""
    bert = BertBase.serve(run)
    return {
        FIRST.name: _forward(bert, "first", rounds=run.rounds(9)),
        STEADY.name: _forward(bert, "steady", rounds=run.rounds(31)),
        MEMORY.name: _peak(bert, rounds=run.rounds(3)),
    }


def _forward(bert: BertBase, what: str, *, rounds: int) -> Pair:
    with Worker("forward", what, "stream", bert.address) as ours, Worker("forward", what, "plain", bert.folder) as peer:
        values = interleaved({"ours": ours.measure, "peer": peer.measure}, rounds=rounds, warmup=2)
    return Pair(values["ours"], values["peer"])


def _peak(bert: BertBase, *, rounds: int) -> Pair:
    """A process has one peak: each value needs a new one."""

    def once(side: str, where: str) -> float:
        with Worker("forward", "peak", side, where) as worker:
            return worker.measure()

    values = interleaved(
        {"ours": lambda: once("stream", bert.address), "peer": lambda: once("plain", str(bert.folder))},
        rounds=rounds,
        warmup=0,
    )
    return Pair(values["ours"], values["peer"])
