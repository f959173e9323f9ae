"""How turns are handed out, to whom, and who is woken when one comes free."""

import asyncio
import time

import pytest

from modelcache_operator.budgets import Budgets
from modelcache_operator.clock import format_time
from modelcache_operator.resources import names
from modelcache_operator.settings import Settings

SETTINGS = Settings(image="i", max_plans=2, max_fetches=3, max_fetches_per_host=2, max_rollouts=1)


class Jobs:
    """The API server's list of Jobs."""

    def __init__(self):
        self.jobs = []
        self.lists = 0

    async def list(self, resource, namespace, *, labels="", fields=""):
        self.lists += 1
        return [job for job in self.jobs if not job.get("status", {}).get("conditions")]


def job(name, component="fetch", host="hub", *, age=0.0, **status):
    labels = {names.COMPONENT_LABEL: component, names.NAME_LABEL: name}
    metadata = {"namespace": "ns", "name": name, "labels": labels, "annotations": {names.HOST_ANNOTATION: host}}
    return {
        "kind": "Job",
        "metadata": metadata | {"creationTimestamp": format_time(time.time() - age)},
        "status": status,
    }


def end(found):
    found["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}


@pytest.fixture
def cluster():
    return Jobs()


@pytest.fixture
def budgets(cluster):
    return Budgets(cluster, SETTINGS)


def ask(budgets, cluster, name, slot="fetch", host="hub"):
    """Ask for a turn as the controller does, and make the Job with it."""

    async def asking():
        async with budgets.lock:
            answer = (await budgets.answer({slot}, ("ns", name), host))[slot]
            if answer and slot != "rollout":
                cluster.jobs.append(job(name, slot, host))
                budgets.created(cluster.jobs[-1])
            return answer

    return asyncio.run(asking())


def test_fetches_are_limited_in_the_cluster_and_by_source_host(budgets, cluster):
    assert [ask(budgets, cluster, f"m{n}") for n in range(3)] == [True, True, False]
    assert ask(budgets, cluster, "m3", host="s3") is True
    assert ask(budgets, cluster, "m4", host="gcs") is False
    assert [ask(budgets, cluster, f"p{n}", "plan") for n in range(3)] == [True, True, False]


def test_after_a_restart_what_runs_already_is_counted(cluster):
    cluster.jobs = [job("m0"), job("m1"), job("done")]
    end(cluster.jobs[2])
    again = Budgets(cluster, SETTINGS)
    assert ask(again, cluster, "m2") is False
    assert ask(again, cluster, "m3", host="s3") is True


def test_jobs_whose_pods_cannot_run_do_not_keep_the_others_from_fetching_for_ever(cluster):
    """As with a StorageClass that does not exist, or an image that cannot be pulled."""
    cluster.jobs = [job(f"stuck{n}", age=301, active=1, ready=0) for n in range(3)]
    assert ask(Budgets(cluster, SETTINGS), cluster, "m") is True
    for holds in (job("new", age=250, active=1), job("runs", age=9999, ready=1), job("backs-off", age=9999, failed=1)):
        cluster.jobs = [holds, holds]
        assert ask(Budgets(cluster, SETTINGS), cluster, "m") is False


def test_a_turn_that_comes_free_wakes_the_first_in_line_and_the_first_of_its_host(budgets, cluster):
    for n in range(2):
        ask(budgets, cluster, f"m{n}")
    ask(budgets, cluster, "other", host="s3")
    for name, host in (("a", "gcs"), ("b", "hub"), ("c", "hub")):
        assert ask(budgets, cluster, name, host=host) is False
    assert budgets.settled(("ns", "m0"), [cluster.jobs[0]], None) == []
    end(cluster.jobs[0])
    assert budgets.settled(("ns", "m0"), [cluster.jobs[0]], None) == [("ns", "a"), ("ns", "b")]
    assert ask(budgets, cluster, "b") is True, "no turn is remembered as taken after its Job has ended"
    assert budgets.settled(("ns", "m0"), [cluster.jobs[0]], None) == []


def test_who_is_gone_is_not_woken_and_gives_its_turn_back(budgets, cluster):
    for n in range(2):
        ask(budgets, cluster, f"m{n}")
    for name in ("a", "b"):
        assert ask(budgets, cluster, name) is False
    assert budgets.forget(("ns", "a")) == []
    cluster.jobs.pop(0)
    assert budgets.forget(("ns", "m0")) == [("ns", "b")]


def test_many_who_wait_make_no_calls(budgets, cluster):
    for n in range(100):
        ask(budgets, cluster, f"m{n}")
    assert cluster.lists == 1


def test_rollouts_go_in_turn(budgets, cluster):
    assert ask(budgets, cluster, "a", "rollout") is True
    assert ask(budgets, cluster, "b", "rollout") is False
    rolling = {"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {"observedGeneration": 1}}
    assert budgets.settled(("ns", "a"), [], rolling) == []
    rolling["status"] = {"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    assert budgets.settled(("ns", "a"), [], rolling) == [("ns", "b")]
    assert ask(budgets, cluster, "b", "rollout") is True
