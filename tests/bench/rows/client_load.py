"""Whole weights into memory, by connections against sockets, and by mmap against safetensors."""

import os

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.setting import ServedBert

WIRE_1 = Row("client.load.raw_tcp_1", unit="s", better="lower", goal=1 / 0.9, issue=4)
WIRE_2 = Row("client.load.raw_tcp_2", unit="s", better="lower", goal=1 / 0.75, issue=4)
MAPPED = Row("client.load.mapped", unit="s", better="lower", goal=1.1, issue=4)
# Where checking alone takes longer than the goal leaves for it (the file in memory, by all cores), it is enough to take
# hardly longer than both one after the other.
VERIFIED = Row(
    "client.load.mapped_verified",
    unit="s",
    better="lower",
    goal=1.8,
    issue=4,
    or_else="client.load.mapped_verified.of_crc",
)
OF_CRC = Row("client.load.mapped_verified.of_crc", unit="s", better="lower", goal=1.1, issue=4)

# 19 layers of 48 MiB and the embeddings: 1.01 GiB.
GIBIBYTE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 19}


@benchmark(WIRE_1, WIRE_2, MAPPED, VERIFIED, OF_CRC)
def load(run: Run) -> dict[str, Pair]:
    """1 GiB: load_state_dict over 1 and 2 connections against as many raw ones; mapped against load_file, touched.

    Both map the file on the volume: how fast a file's pages are mapped depends on how it came into the page cache.
    """
    bert = ServedBert.serve(run, GIBIBYTE)
    raw, size = bert.peer("raw_tcp"), str(bert.size)
    wire = {
        "ours1": bert.worker("client_load", bert.address, "1", "verify"),
        "raw1": bert.worker("read_raw_tcp", raw, size, "1"),
        "ours2": bert.worker("client_load", bert.address, "2", "verify"),
        "raw2": bert.worker("read_raw_tcp", raw, size, "2"),
    }
    before = os.environ.pop("MODELCACHE_VOLUME", None)
    mapped = {
        "mapped": bert.worker("client_load", bert.address, "2", "trust"),
        "verified": bert.worker("client_load", bert.address, "2", "verify"),
        "load_file": bert.worker("read_load_file", bert.published),
        "crc": bert.worker("read_crc", bert.weights),
    }
    if before is not None:
        os.environ["MODELCACHE_VOLUME"] = before
    workers = {**wire, **mapped}
    values = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=run.rounds(9))
    checked = tuple(sum(pair) for pair in zip(values["load_file"], values["crc"], strict=True))
    return {
        WIRE_1.name: Pair(values["ours1"], values["raw1"]),
        WIRE_2.name: Pair(values["ours2"], values["raw2"]),
        MAPPED.name: Pair(values["mapped"], values["load_file"]),
        VERIFIED.name: Pair(values["verified"], values["load_file"]),
        OF_CRC.name: Pair(values["verified"], checked),
    }
