"""What it costs that a block's weights might have to be loaded, where they never are."""

from bench.measure import Pair
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert

PER_COMPONENT = Row("client.hooks.per_component", unit="ms", better="lower", goal=1.0, issue=4)

# Blocks that compute next to nothing, so that what is around them can be seen.
_THIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 24,
    "vocab_size": 96,
}
_GOAL_MS = 0.1


@benchmark(PER_COMPONENT)
def hooks(run: Run) -> dict[str, Pair]:
    """A pass with all layers cached, less a plain one, by block; in place of a peer, the issue's bound."""
    bert = ServedBert.serve(run, _THIN)
    worker = bert.worker("client_hooks", bert.address, bert.folder)
    values = tuple(worker.measure() for _ in range(run.rounds(9)))
    return {PER_COMPONENT.name: Pair(values, (_GOAL_MS,) * len(values))}
