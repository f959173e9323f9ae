"""A replica that starts cold on a slow volume, with and without blocks in Redis."""

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.server_setting import Served
from support.server_redis import redis_server, wait_for_keys

_MIB = 128
_ROW = Row("server.redis.cold_replica.50mb_volume", unit="GB/s", better="higher", goal=10, issue=3)


@benchmark(_ROW)
def cold_replica(run: Run) -> dict[str, Pair]:
    """The first read of 128 MiB over HTTP; every round starts its replica anew."""
    served = Served.make(run, _MIB)
    redis = run.closing.enter_context(redis_server("--maxmemory", "1gb"))
    url = run.folder / "redis-url"
    url.write_text(redis.url)
    shared = ("--redis-url-file", str(url))

    def read(*options: str) -> float:
        server, ports = served.serve("--warmup", "none", *options, module="bench.workers.slow_volume_server")
        with server:
            reader = served.reader(served.target("http", ports["http"]), server.pid, range_mib=28, connections=1)
            return reader.measure()

    # The first replica fills Redis; what it cannot write in time it offers again when it misses again.
    with redis.client() as client:
        while client.dbsize() < _MIB // 4:
            read(*shared)
    wait_for_keys(redis, _MIB // 4)
    values = interleaved({"ours": lambda: read(*shared), "peer": read}, rounds=run.rounds(3), warmup=0)
    return {_ROW.name: Pair(values["ours"], values["peer"])}
