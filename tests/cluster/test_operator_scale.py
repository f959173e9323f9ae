"""A thousand Ready ModelCaches: what a restart of the operator costs, and what it does when nothing happens."""

import re
import urllib.request
from pathlib import Path
from time import sleep

import pytest
import yaml

from modelcache_api import crd
from support.api_server import api_server
from support.many_models import make_many
from support.operating import operator, wait_until

MODELS = 1000
MIB = 2**20
OWN_METRICS = "modelcache_operator_reconciles_total"
REQUESTS = re.compile(
    r'^apiserver_request_total\{.*[{,]resource="(?P<what>[^"]*)".*verb="(?P<verb>[^"]*)".*\} (?P<count>\S+)'
)
WRITES = {"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server():
    with api_server() as running:
        running.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
        make_many(running, MODELS)
        yield running


def writes(server):
    """Writing requests that the API server has answered, by what they wrote, as it counts them itself."""
    request = urllib.request.Request(f"{server.url}/metrics", headers=server.headers)
    with urllib.request.urlopen(request, context=server.context, timeout=30) as response:
        found = [match for line in response.read().decode().splitlines() if (match := REQUESTS.match(line))]
    counted = {}
    for match in found:
        if match["verb"] in WRITES and match["what"] not in {"leases", "events"}:
            counted[match["what"]] = counted.get(match["what"], 0) + float(match["count"])
    return counted


def peak_mib(process):
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def calls(running):
    """The operator's own count, without those that a thousand ModelCaches have no part in."""
    found = running.metric("modelcache_operator_api_calls_total")
    return sum(count for name, count in found.items() if 'what="leases"' not in name)


def test_a_restart_reads_each_once_writes_nothing_and_stays_small(server, tmp_path):
    before = writes(server)
    with operator(server, tmp_path) as running:
        wait_until(lambda: running.metric(OWN_METRICS).get(f'{OWN_METRICS}{{result="ok"}}', 0) >= MODELS, 200)
        sleep(3)
        reconciles = running.metric(OWN_METRICS)
        asked = calls(running)
        assert set(reconciles) == {f'{OWN_METRICS}{{result="ok"}}'}, "none failed"
        assert asked <= 5 * MODELS + 20, "five calls for each, and a list and a watch of each kind at the start"
        sleep(10)
        assert calls(running) == asked, "in steady state there is no call for what is healthy"
        assert writes(server) == before
        assert peak_mib(running.process) <= 200
