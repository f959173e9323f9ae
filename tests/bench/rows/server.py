"""The server's lanes, warm, with tokens, access log and metrics on, against the least that could move the bytes."""

from collections.abc import Callable

from bench.lanes import Target
from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.server_setting import Served, peak_resident_mib
from bench.worker import together

_MIB = 504  # 18 ranges of 28 MiB, 126 of 4
_RANGES = {"28mib": 28, "4mib": 4}


def _rate(name: str, goal: float | None) -> Row:
    return Row(f"server.{name}", unit="GB/s", better="higher", goal=goal, issue=3)


_HTTP = {
    (range_name, connections, peer): _rate(f"http.{range_name}.c{connections}.{peer}", goal)
    for range_name, connections, peer, goal in (
        ("28mib", 1, "raw", 0.95),
        ("28mib", 2, "raw", 0.95),
        ("4mib", 1, "raw", 0.90),
        ("4mib", 2, "raw", 0.90),
        ("28mib", 1, "grpc_bytes", 1.6),
        ("28mib", 2, "grpc_bytes", 2.2),
        ("28mib", 1, "flight", 1.3),
        ("28mib", 2, "flight", 1.6),
    )
}


@benchmark(*_HTTP.values())
def http(run: Run) -> dict[str, Pair]:
    """HTTP ranges on kept connections."""
    served = Served.make(run, _MIB)
    server, ports = served.serve()
    targets = {"ours": (served.target("http", ports["http"]), server.pid)}
    for lane, module in (("raw", "raw_tcp"), ("grpc_bytes", "grpc_bytes"), ("flight", "flight")):
        port, pid = served.peer(module)
        targets[lane] = (Target(lane, port), pid)
    pairs = {}
    for range_name, mebibytes in _RANGES.items():
        for connections in (1, 2):
            rows = {
                peer: row for (name, count, peer), row in _HTTP.items() if (name, count) == (range_name, connections)
            }
            readers = {
                name: served.reader(target, pid, range_mib=mebibytes, connections=connections).measure
                for name, (target, pid) in targets.items()
                if name == "ours" or name in rows
            }
            rates = interleaved(readers, rounds=run.rounds(7))
            pairs |= {row.name: Pair(rates["ours"], rates[peer]) for peer, row in rows.items()}
    return pairs


# The issue's budget was taken from a machine whose raw TCP needs 0.28 s/GB. Where raw TCP alone needs more than the
# budget, nothing that sends over TCP can keep to it: there, as much as raw TCP and a tenth will do.
_CPU = Row(
    "server.http.cpu_of_both_ends",
    unit="s/GB",
    better="lower",
    goal=1.0,
    issue=3,
    or_else="server.http.cpu_of_both_ends.raw",
)
_CPU_RAW = Row("server.http.cpu_of_both_ends.raw", unit="s/GB", better="lower", goal=1.1, issue=3)
_CPU_BUDGET = 0.30


@benchmark(_CPU, _CPU_RAW)
def cpu(run: Run) -> dict[str, Pair]:
    """CPU seconds of server and client per GB, against the budget of the issue and against raw TCP."""
    served = Served.make(run, _MIB)
    server, ports = served.serve()
    port, pid = served.peer("raw_tcp")
    ours = served.reader(served.target("http", ports["http"]), server.pid, range_mib=28, connections=1, measure="cpu")
    raw = served.reader(Target("raw", port), pid, range_mib=28, connections=1, measure="cpu")
    seconds = interleaved({"ours": ours.measure, "raw": raw.measure}, rounds=run.rounds(7))
    budget = tuple(_CPU_BUDGET for _ in seconds["ours"])
    return {_CPU.name: Pair(seconds["ours"], budget), _CPU_RAW.name: Pair(seconds["ours"], seconds["raw"])}


_HTTPS = {
    (1, "raw"): _rate("https.28mib.c1.raw", 0.40),
    (2, "raw"): _rate("https.28mib.c2.raw", 0.30),
    (1, "grpc_tls"): _rate("https.28mib.c1.grpc_tls", 1.0),
    (2, "grpc_tls"): _rate("https.28mib.c2.grpc_tls", 1.0),
}


@benchmark(*_HTTPS.values())
def https(run: Run) -> dict[str, Pair]:
    """HTTPS ranges against unencrypted TCP and grpcio's TLS."""
    served = Served.make(run, _MIB)
    certificate, key = served.certificate()
    server, ports = served.serve("--tls-cert", str(certificate), "--tls-key", str(key))
    raw_port, raw_pid = served.peer("raw_tcp")
    tls_port, tls_pid = served.peer("grpc_tls", certificate, key)
    targets = {
        "ours": (served.target("https", ports["http"], certificate), server.pid),
        "raw": (Target("raw", raw_port), raw_pid),
        "grpc_tls": (Target("grpc_tls", tls_port, certificate=str(certificate)), tls_pid),
    }
    pairs = {}
    for connections in (1, 2):
        readers = {
            name: served.reader(target, pid, range_mib=28, connections=connections).measure
            for name, (target, pid) in targets.items()
        }
        rates = interleaved(readers, rounds=run.rounds(5))
        for peer in ("raw", "grpc_tls"):
            pairs[_HTTPS[connections, peer].name] = Pair(rates["ours"], rates[peer])
    return pairs


_GRPC = {count: _rate(f"grpc.28mib.c{count}.bare", 0.95) for count in (1, 2)}


@benchmark(*_GRPC.values())
def grpc(run: Run) -> dict[str, Pair]:
    """Our Read against a bare grpcio stream of the same messages."""
    served = Served.make(run, _MIB)
    server, ports = served.serve()
    port, pid = served.peer("grpc_stock")
    pairs = {}
    for connections, row in _GRPC.items():
        ours = served.reader(served.target("grpc", ports["grpc"]), server.pid, range_mib=28, connections=connections)
        bare = served.reader(Target("grpc", port), pid, range_mib=28, connections=connections)
        rates = interleaved({"ours": ours.measure, "bare": bare.measure}, rounds=run.rounds(7))
        pairs[row.name] = Pair(rates["ours"], rates["bare"])
    return pairs


_MANY = _rate("http.32_clients.raw", 0.9)
_SLOWEST = Row("server.http.32_clients.slowest_over_median", unit="", better="lower", goal=1.5, issue=3)
_MEMORY = Row("server.http.32_clients.memory", unit="MiB", better="lower", goal=1.0, issue=3)
_CLIENTS = 32
_PROCESSES = 4  # in a single one, so many threads would wait for Python's lock, not for a server


@benchmark(_MANY, _SLOWEST, _MEMORY)
def many_clients(run: Run) -> dict[str, Pair]:
    """32 clients at once, each with ranges of 4 MiB; the slowest against the median, memory against its budget."""
    served = Served.make(run, 2 * 512)
    server, ports = served.serve()
    port, pid = served.peer("raw_tcp")
    target = served.target("http", ports["http"])
    rates = interleaved(
        {"ours": _from_processes(served, target, server.pid), "raw": _from_processes(served, Target("raw", port), pid)},
        rounds=run.rounds(5),
    )
    spread = served.reader(target, server.pid, range_mib=4, connections=_CLIENTS, measure="slowest")
    slowest = tuple(spread.measure() for _ in range(run.rounds(5)))
    cache_mib = 2 * 512 + 64
    return {
        _MANY.name: Pair(rates["ours"], rates["raw"]),
        _SLOWEST.name: Pair(slowest, tuple(1.0 for _ in slowest)),
        _MEMORY.name: Pair((peak_resident_mib(server.pid),), (cache_mib + 256.0,)),
    }


def _from_processes(served: Served, target: Target, pid: int) -> Callable[[], float]:
    """GB/s of all clients together, each process's reading the same part of the file."""
    connections, size = _CLIENTS // _PROCESSES, served.size // _PROCESSES
    workers = [served.reader(target, pid, range_mib=4, connections=connections, size=size) for _ in range(_PROCESSES)]
    return lambda: size * _PROCESSES / 1e9 / together(*workers)
