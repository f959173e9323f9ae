"""What the operator hears of: changes while nobody listened, as when the API server forgot where its watches were."""

import signal

import pytest
import yaml

from modelcache_api import crd
from support.api_server import Refused, api_server
from support.many_models import make_many
from support.operating import operator, wait_until

RECONCILES = "modelcache_operator_reconciles_total"
SERVICE = "/api/v1/namespaces/many-0/services/m0-weights"
DEPLOYMENT = "/apis/apps/v1/namespaces/many-0/deployments/m1-weights"


@pytest.fixture
def server():
    with api_server() as running:
        running.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
        make_many(running, 3)
        yield running


@pytest.fixture
def running(server, tmp_path):
    with operator(server, tmp_path, MODELCACHE_LEASE_NAME="") as running:
        wait_until(lambda: reconciles(running) == 3)
        yield running


def reconciles(running):
    return running.metric(RECONCILES).get(f'{RECONCILES}{{result="ok"}}', 0)


def restart(server):
    server.kill()
    server.start()


def repaired(server):
    try:
        server.get(SERVICE)
    except (Refused, OSError):
        return False
    return server.get(DEPLOYMENT)["spec"]["replicas"] == 1


def test_what_went_and_changed_while_nobody_listened_is_repaired(server, running):
    running.process.send_signal(signal.SIGSTOP)
    restart(server)  # or the events would wait in the connections
    server.delete(SERVICE)
    server.merge(DEPLOYMENT, {"spec": {"replicas": 3}})
    restart(server)  # it knows nothing of what happened before, so that no watch can go on where it was
    running.process.send_signal(signal.SIGCONT)
    wait_until(lambda: repaired(server))
    assert "too old resource version" in running.log.read_text()
    # m2 is as it was; the other two are looked at for the change, and again for what was written
    wait_until(lambda: reconciles(running) >= 5)
    assert "m2" not in running.log.read_text()


def test_watches_go_on_after_a_restart_of_the_api_server(server, running):
    restart(server)
    server.delete(SERVICE)
    server.merge(DEPLOYMENT, {"spec": {"replicas": 3}})
    wait_until(lambda: repaired(server))
