"""The streamed model against the larger of two bounds: the transfer alone, and plain transformers from the disk."""

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert

# WHAT, batch, tokens, torch threads, goal
_FIRST = [
    ("first", 1, 128, 1, 1.10),
    ("first", 8, 128, 2, 1.15),
    ("first", 1, 128, 2, None),
    ("first", 1, 16, 2, None),
    ("cold", 1, 128, 1, None),
]
_STEADY = [("steady3", 1, 128, 1, 1.10), ("steady3", 8, 128, 2, 1.20), ("steady", 8, 128, 2, 1.03)]


def _row(what: str, batch: int, length: int, threads: int, goal: float | None) -> Row:
    return Row(f"client.{what}.{batch}x{length}_t{threads}", unit="s", better="lower", goal=goal, issue=4)


FIRST = {case: _row(*case) for case in _FIRST}
STEADY = {case: _row(*case) for case in _STEADY}
BYTES = Row("client.bytes_per_pass.cache3", unit="1", better="lower", goal=1.0, issue=4)


@benchmark(*FIRST.values(), *STEADY.values(), BYTES)
def stream(run: Run) -> dict[str, Pair]:
    """BERT-base size, loopback, warm server, each side in a process of its own."""
    bert = ServedBert.serve(run)
    pairs = {row.name: _first(bert, *case[:4], run.rounds(9)) for case, row in FIRST.items()}
    pairs |= {row.name: _steady(bert, *case[:4], run.rounds(31)) for case, row in STEADY.items()}
    share = bert.worker("client_forward", "bytes", "1", "128", "1", "stream", bert.address).measure()
    pairs[BYTES.name] = Pair((share,), ((12 - 3 + 1) / 12,))
    return pairs


def _first(bert: ServedBert, what: str, batch: int, length: int, threads: int, rounds: int) -> Pair:
    sizes = (str(batch), str(length), str(threads))
    workers = {
        "ours": bert.worker("client_forward", what, *sizes, "stream", bert.address),
        "plain": bert.worker("client_forward", "first", *sizes, "plain", bert.folder),
        "transfer": bert.worker("client_forward", "transfer", *sizes, "stream", bert.address),
    }
    values = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=rounds, warmup=2)
    bound = tuple(max(pair) for pair in zip(values["plain"], values["transfer"], strict=True))
    return Pair(values["ours"], bound)


def _steady(bert: ServedBert, what: str, batch: int, length: int, threads: int, rounds: int) -> Pair:
    sizes = (str(batch), str(length), str(threads))
    ours = bert.worker("client_forward", what, *sizes, "stream", bert.address)
    plain = bert.worker("client_forward", what, *sizes, "plain", bert.folder)
    values = interleaved({"ours": ours.measure, "peer": plain.measure}, rounds=rounds, warmup=2)
    return Pair(values["ours"], values["peer"])
