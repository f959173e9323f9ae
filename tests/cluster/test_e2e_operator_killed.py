"""The operator killed at each write of a ModelCache's life: the next one goes on, and nothing is done twice."""

import time

import pytest

from cluster.mortal_operator import mortal_operator
from cluster.node import wait_until
from cluster.product import MODELS, Model, children, operator_down


def lives(hub, namespace, repo, states):
    """Apply, change, go back: yields after each."""
    model = Model(namespace, hub, repoId=repo, revision="b1", revisionHistoryLimit=2)
    for revision, state in (("b1", 1), ("b2", 2), ("b1", 1)):
        model.apply(revision=revision)
        cr = model.wait(seconds=280)
        assert cr["status"]["revision"]["active"] == states[state]["commit"]
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_write_it_fetches_each_revision_once(
    when, installed, hub, namespace, kubectl, machine_cluster, tmp_path
):
    states = {}
    for repo in ("org/plain", "org/killed"):
        states[repo] = {seed: hub.commit(seed, repo=repo, branch=f"b{seed}", megabytes=1) for seed in (1, 2)}
    lives(hub, namespace, "org/plain", states["org/plain"])
    namespace.delete(MODELS, "bert")
    wait_until("nothing is left", 90, lambda: not children(namespace, "bert"), pause=0.5)
    with (
        operator_down(kubectl),
        mortal_operator(machine_cluster, namespace.namespace, installed, tmp_path, when) as operator,
    ):
        try:
            model = lives(hub, namespace, "org/killed", states["org/killed"])
        except BaseException:
            print("\n".join(operator.deaths), operator.log.read_text()[-6000:])
            raise
        assert len(operator.deaths) >= 20, operator.deaths
        died_at = {death.rpartition("/")[0].rpartition("/")[2] or death for death in operator.deaths}
        assert {"modelcaches", "deployments", "services", "persistentvolumeclaims"} <= {
            part for death in operator.deaths for part in death.split("/")
        }, died_at
        # at rest nothing is written, or it would die on
        deaths = len(operator.deaths)
        time.sleep(8)
        assert len(operator.deaths) <= deaths + 1
        assert model.condition("UpToDate")["status"] == "True"
    assert hub.count("/files/org/killed/*") == hub.count("/files/org/plain/*"), "each file is fetched once"
    left = namespace.list("jobs", "modelcache.io/name=bert")
    assert len(left) == 2, [job["metadata"]["name"] for job in left]
