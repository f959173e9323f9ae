"""The Hub's API of the server, asked by a hundred pods at once."""

import http.client
import json

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.worker import Worker
from support.processes import Child
from support.server_volume import HOST, make_volume, random_bytes, wait_until

_FILES = 200
_HEAD_P99 = Row("server.hub.head_p99", unit="ms", better="lower", goal=5, issue=6)


@benchmark(_HEAD_P99)
def head_p99(run: Run) -> dict[str, Pair]:
    """p99 of HEAD of 200 files by 100 clients at once, against the p50 of a bare http.server with the same answer.

    The bare server's log, which Python has on by default, is off: the harder peer. Ours logs each request.
    """
    files = {f"model-{number:05}-of-{_FILES:05}.bin": random_bytes(4096, number) for number in range(_FILES)}
    volume, _ = make_volume(run.folder / "volume", files)
    anywhere = ("--host", HOST, "--port", "0", "--http-port", "0", "--status-port", "0", "--cache-size", "64Mi")
    server = run.closing.enter_context(Child.module("modelcache_server", volume.root, *anywhere))
    found = server.wait_for(r"listening \S+ grpc=(\d+) http=(\d+) status=(\d+)")
    port = int(found[2])
    paths = [f"/org/name/resolve/main/{path}" for path in files]
    wait_until(lambda: _head(port, paths[0])[0] == 200, "the server does not become ready", 60)
    listed, headers = run.folder / "paths.json", run.folder / "headers.json"
    listed.write_text(json.dumps(paths))
    # http.server adds Date by itself.
    headers.write_text(json.dumps([header for header in _head(port, paths[0])[1] if header[0] != "Date"]))
    peer = run.closing.enter_context(Child.module("bench.peers.bare_http", headers))
    peer_port = int(peer.wait_for(r"^port (\d+)$")[1])
    workers = {
        name: run.closing.enter_context(Worker("head_load", str(port), str(percentile), listed))
        for name, port, percentile in (("ours", port, 99), ("peer", peer_port, 50))
    }
    values = interleaved({name: worker.measure for name, worker in workers.items()}, rounds=run.rounds(5))
    return {_HEAD_P99.name: Pair(values["ours"], values["peer"])}


def _head(port: int, path: str) -> tuple[int, list[tuple[str, str]]]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("HEAD", path)
        response = connection.getresponse()
        return response.status, response.getheaders()
    finally:
        connection.close()
