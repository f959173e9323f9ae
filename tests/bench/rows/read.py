"""All weights into memory: the wire against the least that a socket, grpcio and the local disk's cache need."""

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert

RAW_TCP = Row("read.whole.raw_tcp", unit="GB/s", better="higher", goal=0.85, issue=1)
RAW_TCP_2 = Row("read.whole.raw_tcp_2", unit="GB/s", better="higher", goal=None, issue=1)
GRPC = Row("read.whole.grpc", unit="GB/s", better="higher", goal=1.4, issue=1)
LOAD_FILE = Row("read.whole.load_file", unit="GB/s", better="higher", goal=None, issue=1)


@benchmark(RAW_TCP, RAW_TCP_2, GRPC, LOAD_FILE)
def read_whole(run: Run) -> dict[str, Pair]:
    """load_state_dict, checksums checked, against a socket (1 and 2 connections), grpcio and a mapped file."""
    bert = ServedBert.serve(run)
    size = str(bert.size)
    raw, grpc = bert.peer("raw_tcp"), bert.peer("grpc_bytes")
    workers = {
        "ours": bert.worker("read_whole", bert.address, size),
        RAW_TCP.name: bert.worker("read_raw_tcp", raw, size, "1"),
        RAW_TCP_2.name: bert.worker("read_raw_tcp", raw, size, "2"),
        GRPC.name: bert.worker("read_grpc", grpc, size),
        LOAD_FILE.name: bert.worker("read_load_file", bert.weights),
    }
    seconds = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=run.rounds(9))
    rates = {name: tuple(bert.size / 1e9 / each for each in values) for name, values in seconds.items()}
    ours = rates.pop("ours")
    return {name: Pair(ours, peer) for name, peer in rates.items()}
