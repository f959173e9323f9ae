"""A restart of the operator over a thousand Ready ModelCaches, against a bare client that reads the same."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from time import perf_counter, sleep

import yaml

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from modelcache_api import crd
from support.api_server import TOKEN, api_server, free_port
from support.many_models import make_many

MODELS = 1000
_DONE = "modelcache_operator_reconciles_total"
_ROW = Row("operator.restart_1000", unit="s", better="lower", goal=1.2, issue=5)


@benchmark(_ROW)
def restart(run: Run) -> dict[str, Pair]:
    """From the start of the process until each ModelCache was reconciled; the peer's until each was read."""
    server = run.closing.enter_context(api_server())
    server.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
    make_many(server, MODELS)
    environment = {
        **os.environ,
        "KUBECONFIG": str(server.kubeconfig),
        "MODELCACHE_IMAGE": "modelcache:test",
        "MODELCACHE_LEASE_NAME": "",
    }

    def ours() -> float:
        port = free_port()
        with (run.folder / "operator.log").open("w") as log:
            began = perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "modelcache_operator"],
                env=environment | {"MODELCACHE_METRICS_PORT": str(port)},
                stderr=log,
            )
            try:
                while _reconciled(port) < MODELS:
                    if process.poll() is not None:
                        raise RuntimeError((run.folder / "operator.log").read_text()[-2000:])
                    sleep(0.05)
                return perf_counter() - began
            finally:
                process.terminate()
                process.wait()

    def peer() -> float:
        began = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "bench.workers.kube_reads", server.url, TOKEN, str(MODELS)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            check=True,
        )
        return perf_counter() - began

    values = interleaved({"ours": ours, "peer": peer}, rounds=run.rounds(3), warmup=1)
    return {_ROW.name: Pair(values["ours"], values["peer"])}


def _reconciled(port: int) -> float:
    """How many reconciles have succeeded; asks for no other metric, which would keep the operator from its work."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics?name[]={_DONE}", timeout=5) as response:
            lines = response.read().decode().splitlines()
    except (urllib.error.URLError, OSError):
        return 0
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f'{_DONE}{{result="ok"}}'))
