"""The life cycle, state by state, decided by pure functions in a world in memory."""

import json

import pytest

from modelcache_operator.asking import NO_ANSWER
from modelcache_operator.clock import format_time
from modelcache_operator.observed import Refusal
from modelcache_operator.resources.server import TokenKeys
from support.operator_world import COMMITS, World

READY = {
    "Resolved": ("True", "Resolved"),
    "Fetched": ("True", "Fetched"),
    "Serving": ("True", "Serving"),
    "UpToDate": ("True", "UpToDate"),
    "Ready": ("True", "Serving"),
}


def states(world):
    return {type_: status for type_, (status, _) in world.conditions.items()}


def test_the_way_to_ready():
    world = World()
    world.settle()
    assert len(world.names("Job")) == 1
    assert world.names("PersistentVolumeClaim") == []
    assert world.conditions["UpToDate"] == ("False", "Planning")
    assert world.conditions["Fetched"] == ("False", "NotResolved")
    assert world.conditions["Serving"] == ("False", "WaitingForFetch")
    assert world.names("Service") == ["bert-weights", "bert-weights-pods"]
    world.finish("plan")
    world.settle()
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == "1Gi"
    assert world.conditions["Fetched"] == ("False", "Fetching")
    assert world.cr["status"]["progress"]["percent"] == "0%"
    assert world.names("Deployment") == []
    world.finish("fetch")
    world.settle()
    assert world.conditions["Serving"] == ("False", "Starting")
    assert world.conditions["Ready"][0] == "False"
    world.servers_are_up()
    world.settle()
    assert world.conditions == READY
    status = world.cr["status"]
    assert status["endpoint"] == {"grpc": "dns:///bert-weights.ns.svc:9090", "http": "http://bert-weights.ns.svc:8080"}
    assert status["revision"]["active"] == COMMITS["main"]
    assert status["revision"]["short"] == "a" * 12
    assert (status["files"], status["bytes"], status["size"]) == (3, 100 * 2**20, "100.0 MiB")
    assert "progress" not in status
    assert world.message("UpToDate") == f"Revision {COMMITS['main']} (main) is what the spec asks for."
    assert world.events == ["Activated"]


def test_when_all_is_well_nothing_is_written_and_nothing_is_asked_for():
    world = World().to_ready()
    world.now += 100_000
    decision = world.decide(slots={})
    assert [*decision.creates, *decision.applies, *decision.deletes, *decision.asks, *decision.notes] == []
    assert decision.status == world.cr["status"]
    assert decision.requeue_after is None


def test_a_process_that_remembers_nothing_does_nothing_again_at_any_step():
    """Every decision is a function of what is in the cluster: repeating a step writes nothing new."""
    world = World()
    for act in (
        lambda: None,
        lambda: world.finish("plan"),
        lambda: world.finish("fetch"),
        world.servers_are_up,
    ):
        act()
        world.settle()
        before = world.writes
        world.step()
        assert world.writes == before


def test_a_change_of_revision_is_fetched_beside_the_running_server():
    world = World().to_ready()
    template = world.deployment()["spec"]["template"]
    world.change(revision="v2")
    world.settle()
    assert world.conditions["Ready"] == ("True", "Serving")
    assert world.conditions["UpToDate"] == ("False", "Planning")
    assert world.cr["status"]["revision"]["active"] == COMMITS["main"]
    world.finish("plan")
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "Fetching")
    world.finish("fetch")
    world.settle()
    assert world.conditions == READY
    revision = world.cr["status"]["revision"]
    assert revision["active"] == COMMITS["v2"]
    assert revision["previous"] == [{"requested": "main", "commit": COMMITS["main"], "digest": "digest-a"}]
    assert world.deployment()["spec"]["template"] == template, "a rebuild restarts no server"


def test_going_back_runs_new_jobs_and_takes_no_old_result_for_a_new_one():
    world = World().to_ready()
    for revision in ("v2", "main", "v2", "main"):
        world.change(revision=revision)
        world.run("plan")
        world.run("fetch")
        assert world.cr["status"]["revision"]["active"] == COMMITS[revision]
        assert world.conditions == READY
    assert len(world.downloads) == 5
    assert len(world.names("Job")) == 2, "the newest of each kind is kept for its logs, no more"


@pytest.mark.parametrize(("limit", "kept"), [(0, ""), (1, "b"), (2, "ba")])
def test_so_many_revisions_are_kept_as_the_spec_says(limit, kept):
    world = World(revisionHistoryLimit=limit).to_ready()
    for revision in ("v2", "bad"):
        world.change(revision=revision)
        world.run("plan")
        world.run("fetch")
    assert world.cr["status"]["revision"]["active"] == COMMITS["bad"]
    assert [p["commit"][0] for p in world.cr["status"]["revision"]["previous"]] == list(kept)


def test_observed_generation_follows_in_the_first_reconcile_after_a_change():
    """`kubectl apply && kubectl wait --for=condition=UpToDate` must never see the old True as the new one."""
    world = World().to_ready()
    world.change(revision="v2")
    decision = world.decide()
    assert decision.status["observedGeneration"] == 2
    up_to_date = next(c for c in decision.status["conditions"] if c["type"] == "UpToDate")
    assert (up_to_date["status"], up_to_date["observedGeneration"]) == ("False", 2)


@pytest.mark.parametrize("component", ["plan", "fetch"])
@pytest.mark.parametrize("reason", ["AuthFailed", "NotFound", "NoSpace", "BadWeights", "SecretMissing"])
def test_a_failing_new_revision_leaves_the_old_one_serving_with_the_reason_shown(component, reason):
    world = World().to_ready()
    world.change(revision="bad")
    world.settle()
    if component == "fetch":
        world.finish("plan")
        world.settle()
    world.finish(component, reason=reason)
    world.settle()
    assert world.conditions["Ready"] == ("True", "Serving")
    assert world.conditions["UpToDate"] == ("False", reason)
    assert world.conditions["Fetched"][0] == "False"
    assert world.cr["status"]["revision"]["active"] == COMMITS["main"]
    message = world.message("UpToDate")
    assert f"{reason} happened." in message
    assert "at most every 5 minutes" in message
    assert "`kubectl annotate --overwrite --namespace=ns mc/bert modelcache.io/reconcile-at=" in message


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_permanent_failure_is_tried_again_after_five_minutes_and_not_before(component):
    world = World()
    world.settle()
    if component == "fetch":
        world.finish("plan")
        world.settle()
    world.finish(component, reason="AuthFailed")
    decision = world.settle()
    assert 299 <= decision.requeue_after <= 300
    world.now += 290
    world.settle()
    assert not world.running("plan")
    assert not world.running("fetch")
    world.now += 11
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "AuthFailed"), "the reason stays while it is tried again"
    assert len(world.running("plan")) == 1, "the source is looked at first"
    world.finish("plan")
    world.settle()
    assert len(world.running("fetch")) == 1
    assert len(world.names("Job")) <= 4
    world.finish("fetch")
    world.settle()
    world.servers_are_up()
    world.settle()
    assert world.conditions == READY


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_the_annotation_has_a_failure_tried_again_at_once(component):
    world = World()
    world.settle()
    if component == "fetch":
        world.finish("plan")
        world.settle()
    world.finish(component, reason="SecretMissing")
    world.settle()
    world.now += 1
    world.annotate("now")
    world.run("plan")
    world.run("fetch")
    assert world.conditions["Fetched"] == ("True", "Fetched")


@pytest.mark.parametrize("component", ["plan", "fetch"])
@pytest.mark.parametrize(
    "change",
    [{"secretRef": {"name": "right"}}, {"storage": {"size": "9Gi"}}, {"fetch": {"env": [{"name": "A", "value": "b"}]}}],
    ids=["secretRef", "storage", "env"],
)
def test_any_change_of_the_spec_has_a_failure_tried_again_at_once_and_only_once(component, change):
    world = World()
    world.settle()
    if component == "fetch":
        world.finish("plan")
        world.settle()
    world.finish(component, reason="AuthFailed")
    world.settle()
    world.now += 1
    world.change(**change)
    world.settle()
    assert len(world.running("plan")) == 1
    world.finish("plan")
    world.settle()
    world.finish("fetch", reason="AuthFailed")
    decision = world.settle()
    assert not world.running("plan")
    assert not world.running("fetch")
    assert 299 <= decision.requeue_after <= 300


PULL = {"containerStatuses": [{"image": "x:1", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_job_that_waits_for_what_was_mended_since_gives_way_to_another(component):
    """A Job's template cannot be changed: without this one it would wait for its image for ever."""
    world = World()
    world.settle()
    if component == "fetch":
        world.finish("plan")
        world.settle()
    [stuck] = world.running(component)
    world.pod_of(stuck, phase="Pending", **PULL)
    world.change(server={"replicas": 2})
    world.settle()
    assert world.running(component) == [stuck], "nothing that its pods are made of has changed"
    world.change(fetch={"imagePullSecrets": [{"name": "pull"}]})
    world.settle()
    [other] = world.running(component)
    assert other["metadata"]["name"] != stuck["metadata"]["name"]
    assert other["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_another_image_in_the_chart_replaces_jobs_that_cannot_pull_the_old_one_and_no_others():
    from dataclasses import replace

    for trouble in ({}, PULL):
        world = World()
        world.settle()
        [job] = world.running("plan")
        world.pod_of(job, phase="Pending", **trouble)
        world.settings = replace(world.settings, image="modelcache:next")
        world.settle()
        [running] = world.running("plan")
        assert (running["metadata"]["name"] == job["metadata"]["name"]) is not bool(trouble)


def test_a_fetch_that_runs_well_goes_on_whatever_else_changes():
    world = World()
    world.run("plan")
    [job] = world.running("fetch")
    world.pod_of(job, phase="Running")
    world.change(fetch={"env": [{"name": "A", "value": "b"}], "concurrency": 2})
    world.settle()
    assert world.running("fetch") == [job]


def test_the_annotation_looks_at_a_moved_branch_once():
    world = World().to_ready()
    world.annotate("1")
    world.settle()
    assert world.conditions == READY, "a look changes nothing until it finds something"
    world.finish("plan", commit="d" * 40)
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "Fetching")
    world.finish("fetch", commit="d" * 40, digest="digest-d")
    world.settle()
    assert world.conditions == READY
    assert not world.running("plan")


def test_transient_failures_are_retried_sooner_at_first_and_later_each_time():
    world = World()
    world.settle()
    waits = []
    for _ in range(6):
        world.finish("plan", reason="Unavailable", permanent=False)
        waits.append(round(world.settle().requeue_after))
        world.now += waits[-1] + 1
        world.settle()
    assert waits == [30, 60, 120, 240, 300, 300]


def test_a_failed_look_while_a_fetch_waits_for_its_retry_does_not_loop_hot():
    world = World()
    world.run("plan")
    world.run("fetch", reason="NoSpace")
    world.now += 301
    world.settle()
    world.finish("plan", reason="Unavailable", permanent=False)
    decision = world.settle()
    assert decision.requeue_after > 20


def test_refresh_looks_again_after_the_interval_and_fetches_only_what_moved():
    world = World(refresh={"interval": "10m"}).to_ready()
    decision = world.settle()
    assert 500 < decision.requeue_after <= 660
    world.now += decision.requeue_after + 1
    world.settle()
    assert len(world.running("plan")) == 1
    assert world.conditions == READY
    world.finish("plan")
    world.settle()
    assert world.conditions == READY
    assert not world.running("fetch")
    world.now += 661
    world.run("plan", commit="d" * 40)
    assert world.conditions["Ready"][0] == "True"
    assert world.conditions["UpToDate"] == ("False", "Fetching")
    world.finish("fetch", commit="d" * 40, digest="digest-d")
    world.settle()
    assert world.cr["status"]["revision"]["active"] == "d" * 40


def test_a_refresh_that_waits_for_its_turn_changes_nothing():
    world = World(refresh={"interval": "10m"}).to_ready()
    world.now += 700
    world.slots["plan"] = False
    world.settle()
    assert world.conditions == READY
    world.slots["plan"] = True
    world.settle()
    assert len(world.running("plan")) == 1


def test_a_failed_refresh_keeps_what_is_served_up_to_date_and_says_so():
    world = World(refresh={"interval": "10m"}).to_ready()
    world.now += 700
    world.run("plan", reason="Unavailable", permanent=False)
    assert world.conditions["Resolved"] == ("False", "Unavailable")
    assert world.conditions["UpToDate"] == ("True", "UpToDate")
    assert "stays in use" in world.message("Resolved")


def test_a_refresh_that_the_api_server_refuses_says_so_and_keeps_what_is_served_up_to_date():
    """Without a Job there is nothing that ever fails: it would look as if the branch did not move."""
    world = World(refresh={"interval": "10m"}).to_ready()
    world.now += 700
    [job] = world.decide().creates
    world.refusals["Job", job["metadata"]["name"]] = Refusal(403, "exceeded quota: jobs")
    world.cr["status"] = world.decide().status
    assert world.conditions == READY | {"Resolved": ("False", "QuotaExceeded")}
    assert "stays in use" in world.message("Resolved")
    world.refusals.clear()
    world.run("plan")
    assert world.conditions == READY


def test_a_refresh_whose_pod_has_to_wait_for_a_node_changes_nothing():
    world = World(refresh={"interval": "10m"}).to_ready()
    world.now += 700
    world.settle()
    [job] = world.running("plan")
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    world.pod_of(job, phase="Pending", conditions=[unschedulable])
    world.settle()
    assert world.conditions == READY


def test_a_branch_that_moves_during_the_fetch_is_taken_as_it_was_fetched():
    world = World()
    world.run("plan")
    world.run("fetch", commit="d" * 40, digest="digest-d")
    assert not world.running("fetch")
    assert world.cr["status"]["revision"] | {"previous": []} == {
        "requested": "main", "activeRequested": "main", "resolved": "d" * 40, "active": "d" * 40, "short": "d" * 12,
        "previous": [],
    }  # fmt: skip


def test_a_new_spec_stops_the_fetch_of_the_old_one_and_waits_until_its_pod_is_gone():
    world = World()
    world.run("plan")
    [old] = world.running("fetch")
    pod = world.pod_of(old, phase="Running")
    world.change(revision="v2")
    world.settle()
    assert not world.running("fetch")
    world.finish("plan")
    world.settle()
    assert world.conditions["Fetched"] == ("False", "Waiting")
    world.objects.pop(("Pod", pod["metadata"]["name"]))
    world.settle()
    assert len(world.running("fetch")) == 1


def test_a_result_that_went_with_its_pod_is_made_again():
    world = World()
    world.settle()
    world.finish("plan")
    for name in world.names("Pod"):
        world.objects.pop(("Pod", name))
    world.settle()
    assert len(world.running("plan")) == 1
    world.finish("plan")
    world.settle()
    assert world.conditions["Resolved"][0] == "True"


def test_suspend_stops_jobs_and_keeps_serving_and_goes_on_afterwards():
    world = World().to_ready()
    world.change(suspend=True, revision="v2")
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "Suspended")
    assert world.conditions["Ready"][0] == "True"
    assert not world.running("plan")
    world.change(suspend=False)
    world.run("plan")
    world.change(suspend=True)
    world.settle()
    assert not world.running("fetch")
    assert world.conditions["Fetched"] == ("False", "Suspended")
    assert world.conditions["Ready"][0] == "True"
    world.change(suspend=False)
    world.settle()
    assert len(world.running("fetch")) == 1


def test_without_servers_pods_mount_the_volume_and_scaling_brings_them_back():
    world = World(server={"replicas": 0})
    world.run("plan")
    world.run("fetch")
    assert world.conditions["Serving"] == ("False", "MountOnly")
    assert world.conditions["Ready"] == ("True", "MountOnly")
    assert world.conditions["UpToDate"] == ("True", "UpToDate")
    assert world.names("Deployment") == world.names("Service") == []
    assert "endpoint" not in world.cr["status"]
    world.change(server={"replicas": 2})
    world.settle()
    world.servers_are_up()
    world.settle()
    assert world.conditions == READY
    assert world.cr["status"]["server"] == {
        "replicas": 2, "readyReplicas": 2, "selector": "modelcache.io/component=server,modelcache.io/name=bert"
    }  # fmt: skip
    world.change(server={"replicas": 0})
    world.settle()
    assert world.names("Deployment") == world.names("Service") == []
    assert world.conditions["Ready"] == ("True", "MountOnly")


def test_servers_that_still_announce_the_old_revision_keep_it_from_being_up_to_date():
    world = World().to_ready()
    world.change(revision="v2")
    world.run("plan")
    world.finish("fetch")
    world.announced = frozenset({"digest-a"})
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "Announcing")
    assert world.conditions["Ready"][0] == "True"
    world.announced = frozenset({"digest-b"})
    world.settle()
    assert world.conditions == READY


# --- the volume


def test_a_server_that_is_too_slow_to_answer_is_waited_for_but_not_for_ever():
    """A busy one may still serve the old revision; one that a NetworkPolicy hides never answers."""
    world = World().to_ready()
    world.change(revision="v2")
    world.run("plan")
    world.announced = frozenset({"digest-b", NO_ANSWER})
    world.finish("fetch")
    decision = world.settle()
    assert world.conditions["UpToDate"] == ("False", "Announcing")
    assert "port 9091" in world.message("UpToDate")
    assert decision.requeue_after <= 2
    world.now += 55
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "Announcing")
    world.now += 6
    world.step()
    assert world.conditions == READY
    assert world.events[-1] == "NoAnswer"


def test_the_volume_grows_for_a_larger_revision_and_never_shrinks():
    world = World().to_ready()
    world.change(revision="v2")
    world.run("plan", bytes=10 * 2**30)
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == "12Gi"
    world.finish("fetch", bytes=10 * 2**30)
    world.settle()
    world.change(revision="main")
    world.run("plan", bytes=2**20)
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == "12Gi"


def test_a_fetch_waits_for_growth_but_not_for_what_only_its_own_mount_can_finish():
    world = World().to_ready()
    world.change(revision="v2")
    world.settle()
    world.finish("plan", bytes=10 * 2**30)
    world.step()
    world.claim()["status"]["capacity"] = {"storage": "1Gi"}
    world.settle()
    assert world.conditions["Fetched"] == ("False", "GrowingVolume")
    assert not world.running("fetch")
    world.claim()["status"]["conditions"] = [{"type": "FileSystemResizePending", "status": "True"}]
    world.settle()
    assert len(world.running("fetch")) == 1


def test_a_fetch_does_not_wait_for_growth_for_ever():
    world = World().to_ready()
    world.change(revision="v2")
    world.settle()
    world.finish("plan", bytes=10 * 2**30)
    world.step()
    world.claim()["status"]["capacity"] = {"storage": "1Gi"}
    world.settle()
    world.now += 121
    world.settle()
    assert len(world.running("fetch")) == 1


def test_growth_that_the_class_refuses_is_said_and_the_fetch_tries_with_what_there_is():
    world = World().to_ready()
    world.change(revision="v2")
    world.settle()
    world.finish("plan", bytes=10 * 2**30)
    from modelcache_operator.observed import Refusal

    world.refusals["PersistentVolumeClaim", "bert-weights"] = Refusal(403, "the class does not support resize")
    world.settle()
    assert len(world.running("fetch")) == 1
    world.finish("fetch", reason="NoSpace")
    world.settle()
    assert world.conditions["Fetched"] == ("False", "NoSpace")
    assert "the class does not support resize" in world.message("Fetched")
    assert world.conditions["Ready"][0] == "True"


def test_a_size_that_the_class_refuses_is_said_although_all_is_well():
    from modelcache_operator.observed import Refusal

    world = World(storage={"size": "5Gi"}).to_ready()
    world.refusals["PersistentVolumeClaim", "bert-weights"] = Refusal(403, "the class does not support resize")
    world.change(storage={"size": "9Gi"})
    world.settle()
    assert world.conditions == READY
    assert "could not be grown to 9.0 GiB: the class does not support resize" in world.message("Fetched")


def test_the_users_size_counts_and_raising_it_during_a_fetch_does_not_stop_it():
    world = World(storage={"size": "5Gi"})
    world.run("plan")
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == "5Gi"
    [job] = world.running("fetch")
    world.change(storage={"size": "7Gi"})
    world.settle()
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == "7Gi"
    assert world.running("fetch") == [job]


def test_a_deleted_volume_stops_the_servers_and_is_made_and_filled_anew():
    world = World().to_ready()
    world.claim()["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    world.settle()
    assert world.deployment()["spec"]["replicas"] == 0
    # a claim is in use for as long as a pod of it exists, also one that has ended
    assert not [name for kind, name in world.objects if kind == "Job" and "-fetch-" in name]
    assert world.conditions["Ready"] == ("False", "VolumeTerminating")
    assert world.events[-1] == "VolumeTerminating"
    world.objects.pop(("PersistentVolumeClaim", "bert-weights"))
    world.settle()
    assert world.claim()["metadata"]["uid"] != ""
    assert world.conditions["Fetched"] == ("False", "Fetching")
    world.finish("fetch")
    world.settle()
    assert world.deployment()["spec"]["replicas"] == 1
    world.servers_are_up()
    world.settle()
    assert world.conditions == READY


def test_a_volume_that_is_replaced_behind_our_back_holds_nothing():
    world = World().to_ready()
    world.claim()["metadata"]["uid"] = "another"
    world.settle()
    assert world.conditions["Fetched"] == ("False", "Fetching")
    assert world.deployment()["spec"]["replicas"] == 0


def test_an_existing_claim_is_used_and_never_written():
    world = World(storage={"existingClaim": "mine"})
    world.run("plan")
    assert world.conditions["Fetched"] == ("False", "ClaimNotFound")
    mine = world.add(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "mine"},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }
    )
    before = dict(mine)
    world.settle()
    [job] = world.running("fetch")
    assert job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"
    world.finish("fetch")
    world.settle()
    assert world.objects["PersistentVolumeClaim", "mine"] == before
    assert world.cr["status"]["volume"] == {"claimName": "mine"}
    assert "affinity" not in world.deployment()["spec"]["template"]["spec"], "ReadWriteMany: they spread"


def test_a_retained_volume_has_no_owner_and_the_next_of_the_name_adopts_it():
    world = World(storage={"reclaimPolicy": "Retain"}).to_ready()
    claim = world.claim()
    assert "ownerReferences" not in claim["metadata"]
    heir = World(storage={"reclaimPolicy": "Delete"})
    heir.cr["metadata"]["uid"] = "cr-2"
    heir.objects["PersistentVolumeClaim", "bert-weights"] = claim
    heir.to_ready()
    assert heir.conditions == READY
    assert heir.claim()["metadata"]["ownerReferences"][0]["uid"] == "cr-2"
    assert heir.claim()["metadata"]["uid"] == claim["metadata"]["uid"]


def test_the_volume_of_the_one_that_had_the_name_before_is_waited_for():
    world = World()
    old = World().to_ready().claim()
    old["metadata"]["ownerReferences"][0]["uid"] = "cr-0"
    world.objects["PersistentVolumeClaim", "bert-weights"] = old
    world.run("plan")
    assert world.conditions["Fetched"] == ("False", "VolumeTerminating")
    world.objects.pop(("PersistentVolumeClaim", "bert-weights"))
    world.settle()
    assert world.conditions["Fetched"] == ("False", "Fetching")


# --- strangers, drift, refusals


@pytest.mark.parametrize(
    ("kind", "name", "condition"),
    [
        ("Deployment", "bert-weights", "Serving"),
        ("Service", "bert-weights", "Serving"),
        ("Service", "bert-weights-pods", "Serving"),
        ("PersistentVolumeClaim", "bert-weights", "Fetched"),
    ],
)
def test_a_stranger_with_our_name_is_not_touched(kind, name, condition):
    world = World()
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "template": {}}
    stranger = world.add({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
    before = dict(stranger)
    world.run("plan")
    if condition == "Serving":
        world.finish("fetch")
        world.settle()
    assert world.conditions[condition] == ("False", "NameConflict")
    assert world.conditions["UpToDate"] == ("False", "NameConflict")
    assert name in world.message(condition)
    assert world.objects[kind, name] == before
    world.objects.pop((kind, name))
    world.settle()
    assert world.conditions[condition][1] != "NameConflict"


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_job_that_is_not_ours_any_more_is_told_and_not_waited_for_as_if_it_went(component):
    """As `kubectl delete mc --cascade=orphan` leaves them."""
    world = World()
    if component == "fetch":
        world.run("plan")
    [job] = world.decide().creates or world.running(component)
    job = world.add(job)
    job["metadata"]["ownerReferences"] = []
    decision = world.settle()
    assert world.conditions["UpToDate"] == ("False", "NameConflict")
    assert job["metadata"]["name"] in world.message("UpToDate")
    assert decision.requeue_after >= 30
    job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    decision = world.settle()
    assert world.conditions["UpToDate"] == ("False", "Waiting")
    assert decision.requeue_after <= 1
    world.objects.pop(("Job", job["metadata"]["name"]))
    world.settle()
    assert len(world.running(component)) == 1


def test_drift_is_repaired():
    world = World().to_ready()
    world.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] = "evil:latest"
    world.deployment()["spec"]["replicas"] = 7
    world.objects["Service", "bert-weights"]["spec"]["selector"] = {}
    world.objects.pop(("Service", "bert-weights-pods"))
    world.settle()
    assert world.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] == "modelcache:test"
    assert world.deployment()["spec"]["replicas"] == 1
    assert world.objects["Service", "bert-weights"]["spec"]["selector"]["modelcache.io/name"] == "bert"
    assert world.names("Service") == ["bert-weights", "bert-weights-pods"]


def test_a_deleted_deployment_comes_back():
    world = World().to_ready()
    world.objects.pop(("Deployment", "bert-weights"))
    world.settle()
    assert world.names("Deployment") == ["bert-weights"]
    assert world.conditions["Ready"] == ("False", "Starting")


def test_what_others_add_is_left_alone():
    world = World().to_ready()
    world.deployment()["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "1"
    world.deployment()["spec"]["progressDeadlineSeconds"] = 600
    world.deployment()["spec"]["template"]["spec"]["containers"].append({"name": "mesh", "image": "proxy"})
    before = world.writes
    world.step()
    assert world.writes == before


def test_an_upgrade_of_the_operator_fetches_nothing_and_rolls_the_servers_in_turn():
    from dataclasses import replace

    world = World().to_ready()
    jobs = world.names("Job")
    world.settings = replace(world.settings, image="modelcache:next")
    world.slots["rollout"] = False
    decision = world.settle()
    assert decision.requeue_after == 300
    assert world.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] == "modelcache:test"
    assert world.conditions == READY | {"UpToDate": ("False", "WaitingForTurn")}, "they serve, and are of before"
    world.slots["rollout"] = True
    world.settle()
    assert world.deployment()["spec"]["template"]["spec"]["containers"][0]["image"] == "modelcache:next"
    assert world.names("Job") == jobs


def test_servers_that_wait_for_their_turn_are_not_up_to_date_until_they_are_replaced():
    """Who waits for UpToDate after a change of the servers must not be told that it is done before it began."""
    world = World().to_ready()
    world.slots["rollout"] = False
    world.change(server={"cacheSize": "128Mi", "replicas": 2})
    first = world.step()
    assert world.conditions == READY | {"UpToDate": ("False", "WaitingForTurn")}
    assert "waits for its turn" in world.message("UpToDate")
    before = world.writes
    world.now += first.requeue_after
    world.step()
    assert world.writes == before, "an operator that looks again, or begins anew, has nothing to write"
    world.slots["rollout"] = True
    world.step()
    assert world.conditions["UpToDate"] == ("False", "RollingOut")
    world.deployment()["metadata"]["generation"] = 2
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW
    world.settle()
    assert world.conditions == READY


def test_a_change_of_the_servers_that_is_taken_back_while_it_waits_is_up_to_date_at_once():
    world = World().to_ready()
    world.slots["rollout"] = False
    world.change(server={"cacheSize": "128Mi"})
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "WaitingForTurn")
    world.change(server={})
    world.settle()
    assert world.conditions == READY


def test_servers_that_came_up_while_another_change_of_them_waits_are_where_clients_connect():
    world = World().to_ready()
    world.change(server={"access": {"tls": {"secretName": "tls"}}})
    world.step()
    world.slots["rollout"] = False
    world.change(server={"access": {"tls": {"secretName": "tls"}}, "cacheSize": "128Mi"})
    world.deployment()["metadata"]["generation"] = 2
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "WaitingForTurn")
    assert world.cr["status"]["endpoint"]["http"] == "https://bert-weights.ns.svc:8080"


# What a Deployment of generation 2 says of itself, from before its controller saw the change.
ALL_SERVERS_ARE_NEW = {
    "observedGeneration": 2,
    "replicas": 1,
    "updatedReplicas": 1,
    "readyReplicas": 1,
    "availableReplicas": 1,
}
SERVERS_OF_BEFORE_ARE_LEFT = (
    ALL_SERVERS_ARE_NEW | {"observedGeneration": 1},
    ALL_SERVERS_ARE_NEW | {"updatedReplicas": 0},
    ALL_SERVERS_ARE_NEW | {"replicas": 2},
)


@pytest.mark.parametrize(
    "change",
    [
        {"cacheSize": "128Mi"},
        {"access": {"mode": "Token", "serviceAccounts": [{"name": "app"}]}},
        {"access": {"tls": {"secretName": "tls"}}},
    ],
    ids=["cacheSize", "Token", "tls"],
)
def test_a_change_of_the_servers_is_up_to_date_when_no_server_of_before_runs_any_more(change):
    """Who has just closed a model with tokens must not be told that all is done while it is still open."""
    world = World().to_ready()
    world.keys = TokenKeys("https://issuer", "{}")
    world.change(server=change)
    first = world.step().status["conditions"]
    assert [(c["status"], c["reason"]) for c in first if c["type"] == "UpToDate"] == [("False", "RollingOut")]
    world.deployment()["metadata"]["generation"] = 2
    for status in SERVERS_OF_BEFORE_ARE_LEFT:
        world.deployment()["status"] = status
        world.settle()
        assert world.conditions["UpToDate"] == ("False", "RollingOut")
        assert world.conditions["Ready"] == ("True", "Serving"), "servers of before still read"
    container = {"image": "x:1", "state": {"waiting": {"reason": "ImagePullBackOff"}}}
    labels = {"modelcache.io/component": "server"}
    pod = {"kind": "Pod", "metadata": {"name": "new", "labels": labels}, "status": {"containerStatuses": [container]}}
    world.add(pod)
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "ImagePullError")
    world.objects.pop(("Pod", "new"))
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW
    world.settle()
    assert world.conditions == READY


def test_the_endpoint_is_that_of_the_servers_that_run():
    """https only when no server of before is left; who asks for TLS with a wrong Secret keeps what works."""
    world = World().to_ready()
    host = "bert-weights.ns.svc:8080"
    world.slots["rollout"] = False
    world.change(server={"access": {"tls": {"secretName": "tls"}}})
    world.settle()
    assert world.cr["status"]["endpoint"]["http"] == f"http://{host}", "the change waits for its turn"
    world.slots["rollout"] = True
    world.step()
    world.deployment()["metadata"]["generation"] = 2
    for status in SERVERS_OF_BEFORE_ARE_LEFT:
        world.deployment()["status"] = status
        world.settle()
        assert world.cr["status"]["endpoint"]["http"] == f"http://{host}"
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW
    world.settle()
    assert world.cr["status"]["endpoint"]["http"] == f"https://{host}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('pods "x" is forbidden: exceeded quota: small', "QuotaExceeded"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "PodRefused"),
    ],
)
def test_new_servers_that_the_namespace_refuses_are_told_while_those_of_before_serve(text, reason):
    """A quota without room for one server more stops a rollout for ever, and no pod is there to say so."""
    world = World().to_ready()
    world.change(server={"cacheSize": "128Mi"})
    world.step()
    world.deployment()["metadata"]["generation"] = 2
    failing = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": text}
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW | {"updatedReplicas": 0, "conditions": [failing]}
    world.settle()
    assert world.conditions == READY | {"UpToDate": ("False", reason)}
    assert world.message("UpToDate") == text
    world.deployment()["status"] = ALL_SERVERS_ARE_NEW
    world.settle()
    assert world.conditions == READY


@pytest.mark.parametrize("change", [{"cacheSize": "128Mi"}, {"replicas": 2}], ids=["other servers", "more servers"])
def test_a_change_of_the_servers_that_is_refused_is_not_up_to_date_and_says_why(change):
    world = World().to_ready()
    world.change(server=change)
    world.refusals["Deployment", "bert-weights"] = Refusal(403, "admission webhook denied the request: no")
    for _ in range(2):
        world.step()
        assert world.conditions == READY | {"UpToDate": ("False", "Forbidden")}
        assert world.message("UpToDate") == "admission webhook denied the request: no"
    world.refusals.clear()
    world.step()
    assert world.conditions["UpToDate"][1] != "Forbidden"


def test_servers_without_their_service_cannot_be_read():
    world = World().to_ready()
    world.objects.pop(("Service", "bert-weights"))
    world.refusals["Service", "bert-weights"] = Refusal(403, "exceeded quota: services")
    world.step()
    assert world.conditions["Serving"] == ("False", "QuotaExceeded")
    assert world.conditions["Ready"] == ("False", "QuotaExceeded")
    assert world.message("UpToDate") == "exceeded quota: services"
    world.refusals.clear()
    world.settle()
    assert world.conditions == READY


def test_a_service_that_cannot_be_mended_is_not_up_to_date_and_still_reads():
    world = World().to_ready()
    world.objects["Service", "bert-weights"]["spec"]["ports"] = []
    world.refusals["Service", "bert-weights"] = Refusal(422, "spec.ports is invalid")
    world.step()
    assert world.conditions == READY | {"UpToDate": ("False", "Refused")}


def test_scaling_leaves_the_model_up_to_date():
    world = World().to_ready()
    world.change(server={"replicas": 2})
    world.step()
    assert world.conditions == READY
    world.deployment()["metadata"]["generation"] = 2
    world.step()
    assert world.conditions == READY, "the Deployment's controller has not seen it yet"


def test_a_server_that_is_lost_leaves_the_model_up_to_date():
    world = World(server={"replicas": 2}).to_ready()
    world.deployment()["status"]["availableReplicas"] = 1
    world.settle()
    assert world.conditions == READY


def test_scaling_needs_no_turn():
    world = World().to_ready()
    world.slots["rollout"] = False
    world.change(server={"replicas": 3})
    world.settle()
    assert world.deployment()["spec"]["replicas"] == 3


def test_budgets_are_asked_before_a_job_is_made_and_a_full_one_is_waited_for():
    world = World()
    assert world.decide(slots={}).asks == {"plan"}
    assert not world.decide(slots={}).creates
    world.settle()
    world.finish("plan")
    world.slots["fetch"] = False
    decision = world.settle()
    assert world.conditions["Fetched"] == ("False", "WaitingForTurn")
    assert decision.requeue_after == 60
    world.slots["fetch"] = True
    world.settle()
    assert len(world.running("fetch")) == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {"containerStatuses": [{"image": "x:1", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
            "ImagePullError",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}]},
            "Unschedulable",
        ),
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "m"}}}]},
            "CreateContainerConfigError",
        ),
    ],
)
def test_what_keeps_a_jobs_pod_from_running_is_the_reason(status, reason):
    world = World()
    world.settle()
    [job] = world.running("plan")
    world.pod_of(job, phase="Pending", **status)
    world.settle()
    assert world.conditions["Resolved"] == ("False", reason)
    assert world.conditions["Ready"] == ("False", reason)


def failed_job(world, component, *pods, reason="BackoffLimitExceeded"):
    """End the running Job of a component without a result of its program."""
    [job] = world.running(component)
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": f"it was {reason}"}
    job["status"] = {"conditions": [condition | {"lastTransitionTime": format_time(world.now)}]}
    for terminated in pods:
        world.pod_of(job, phase="Failed", containerStatuses=[{"name": "main", "state": {"terminated": terminated}}])
    world.settle()


@pytest.mark.parametrize(
    ("pods", "reason", "words"),
    [
        ([{"exitCode": 137, "reason": "OOMKilled"}], "OutOfMemory", "raise spec.fetch.resources.limits.memory"),
        ([{"exitCode": 66, "message": "not JSON"}], "AuthFailed", "not JSON"),
        ([{"exitCode": 66}], "AuthFailed", "check the secret"),
        ([{"exitCode": 1, "message": "Traceback: boom"}], "ContainerFailed", "exit code 1. Traceback: boom"),
        ([], "JobFailed", "it was BackoffLimitExceeded"),
    ],
)
def test_a_job_that_failed_without_a_word_of_its_program_is_told_from_what_there_is(pods, reason, words):
    world = World()
    world.run("plan")
    failed_job(world, "fetch", *pods)
    assert world.conditions["Fetched"] == ("False", reason)
    assert words in world.message("Ready")


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_job_that_took_too_long_says_so_and_not_that_its_pod_was_killed_for_it(component):
    world = World(fetch={"activeDeadlineSeconds": 60})
    if component == "fetch":
        world.run("plan")
    world.settle()
    failed_job(world, component, {"exitCode": 143}, reason="DeadlineExceeded")
    assert world.conditions["UpToDate"] == ("False", "DeadlineExceeded")
    assert "after 60 s" in world.message("UpToDate")
    assert "raise spec.fetch.activeDeadlineSeconds" in world.message("UpToDate")
    assert "143" not in world.message("UpToDate")
    world.now += 31
    world.settle()
    [job] = world.running("plan")
    world.pod_of(job, phase="Pending", **PULL)
    world.settle()
    assert world.conditions["Resolved"] == (
        ("False", "ImagePullError") if component == "plan" else ("True", "Resolved")
    )


def test_a_job_that_took_too_long_says_what_its_program_had_met():
    world = World(fetch={"activeDeadlineSeconds": 60})
    world.settle()
    said = {"result": "failed", "reason": "Unavailable", "permanent": False, "message": "The hub answers 503."}
    failed_job(world, "plan", {"exitCode": 81, "message": json.dumps(said)}, reason="DeadlineExceeded")
    assert world.conditions["Resolved"] == ("False", "DeadlineExceeded")
    assert world.message("Resolved").count("The hub answers 503.") == 1


def test_a_pod_that_the_namespace_refuses_is_the_reason_for_jobs_and_for_servers():
    text = 'pods "x" is forbidden: violates PodSecurity "restricted:latest"'
    world = World()
    world.settle()
    [job] = world.running("plan")
    world.warnings[job["metadata"]["uid"]] = [text]
    world.settle()
    assert world.conditions["Resolved"] == ("False", "PodRefused")
    assert "PodSecurity" in world.message("Ready")
    world.run("plan")
    world.run("fetch")
    failing = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": text}
    world.deployment()["status"] = {"conditions": [failing]}
    world.settle()
    assert world.conditions["Serving"] == ("False", "PodRefused")
    world.deployment()["status"] = {"conditions": [failing | {"message": "exceeded quota: small"}]}
    world.settle()
    assert world.conditions["Serving"] == ("False", "QuotaExceeded")


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (403, "jobs.batch is forbidden: User x cannot create", "Forbidden"),
        (403, "exceeded quota: small", "QuotaExceeded"),
        (422, "spec.template is invalid", "Refused"),
    ],
)
def test_what_the_api_server_does_not_take_is_the_reason_in_its_own_words(status, message, reason):
    world = World()
    [job] = world.decide().creates
    world.refusals["Job", job["metadata"]["name"]] = Refusal(status, message)
    world.settle()
    assert world.conditions["Resolved"] == ("False", reason)
    assert message in world.message("Ready")


CRASHED = {"exitCode": 71, "message": "tls.crt is missing"}


@pytest.mark.parametrize(
    ("container", "reason", "words"),
    [
        ({"state": {"waiting": {"reason": "CrashLoopBackOff"}}}, "CrashLoopBackOff", "tls.crt is missing"),
        ({"state": {"running": {}}, "restartCount": 2}, "CrashLoopBackOff", "tls.crt is missing"),
        ({"state": {"running": {}}, "restartCount": 1}, "Starting", ""),
        (
            {"state": {"running": {}}, "restartCount": 3, "lastState": {"terminated": {"exitCode": 0}}},
            "Starting",
            "",
        ),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            },
            "OutOfMemory",
            "lower spec.server.cacheSize",
        ),
    ],
)
def test_servers_that_crash_say_so_steadily_and_with_their_last_words(container, reason, words):
    world = World()
    world.run("plan")
    world.run("fetch")
    status = {"image": "x:1", "restartCount": 1, "ready": False, "lastState": {"terminated": CRASHED}} | container
    labels = {"modelcache.io/component": "server"}
    world.add({"kind": "Pod", "metadata": {"name": "s", "labels": labels}, "status": {"containerStatuses": [status]}})
    world.settle()
    assert world.conditions["Serving"] == ("False", reason)
    assert words in world.message("Ready")


def test_a_server_that_was_evicted_after_crashes_is_not_what_keeps_others_from_starting():
    """Kubernetes leaves such pods lying around for long."""
    world = World()
    world.run("plan")
    world.run("fetch")
    container = {"state": {}, "restartCount": 2, "ready": False, "lastState": {"terminated": CRASHED}}
    status = {"phase": "Failed", "reason": "Evicted", "containerStatuses": [container]}
    labels = {"modelcache.io/component": "server"}
    world.add({"kind": "Pod", "metadata": {"name": "s", "labels": labels}, "status": status})
    world.settle()
    assert world.conditions["Serving"] == ("False", "Starting")


def test_a_child_of_the_one_that_had_the_name_before_is_waited_for():
    world = World()
    owner = {"apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "name": "bert", "uid": "earlier"}
    metadata = {"name": "bert-weights", "ownerReferences": [owner]}
    world.add({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {}})
    decision = world.settle()
    assert world.conditions["Serving"] == ("False", "Terminating")
    assert decision.requeue_after <= 2
    world.objects.pop(("Service", "bert-weights"))
    world.to_ready()
    assert world.conditions == READY


def test_a_volume_that_is_lost_says_what_can_be_done():
    world = World().to_ready()
    world.claim()["status"]["phase"] = "Lost"
    world.settle()
    assert world.conditions["Fetched"] == ("False", "VolumeLost")
    assert "delete the claim" in world.message("UpToDate")
    assert not world.running("fetch")


@pytest.mark.parametrize("gone", [{"status": {"phase": "Lost"}}, {"deletionTimestamp": "2026-01-01T00:00:00Z"}])
def test_nobody_is_told_that_a_claim_of_their_own_is_made_anew(gone):
    world = World(storage={"existingClaim": "mine"})
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "mine"} | {k: v for k, v in gone.items() if k != "status"}
    world.add({"kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec, "status": gone.get("status", {})})
    world.run("plan")
    assert world.conditions["Fetched"][1] in {"VolumeLost", "VolumeTerminating"}
    assert "made anew" not in world.message("UpToDate")
    assert "create it" in world.message("UpToDate")


def test_a_quota_that_only_events_tell_of_is_the_reason():
    world = World()
    world.settle()
    [job] = world.running("plan")
    world.warnings[job["metadata"]["uid"]] = ['pods "x" is forbidden: exceeded quota: small, requested: pods=1']
    world.settle()
    assert world.conditions["Resolved"] == ("False", "QuotaExceeded")


def test_a_volume_that_cannot_be_mounted_is_the_reason_for_jobs_and_for_servers():
    world = World()
    world.run("plan")
    [job] = world.running("fetch")
    pod = world.pod_of(job, phase="Pending")
    world.warnings[pod["metadata"]["uid"]] = ['MountVolume.SetUp failed for volume "ca": configmap "x" not found']
    world.settle()
    assert world.conditions["Fetched"] == ("False", "MountFailed")
    assert 'configmap "x" not found' in world.message("Ready")
    world.objects.pop(("Pod", pod["metadata"]["name"]))
    world.finish("fetch")
    world.settle()
    labels = {"modelcache.io/component": "server"}
    server = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "s", "labels": labels}}
    world.warnings[world.add(server)["metadata"]["uid"]] = ["Multi-Attach error"]
    world.settle()
    assert world.conditions["Serving"] == ("False", "MountFailed")


def test_snapshots_that_readers_hold_are_waited_for():
    world = World().to_ready()
    world.change(revision="v2")
    world.run("plan")
    world.finish("fetch", reason="SpaceHeldByReaders", permanent=False)
    decision = world.settle()
    assert world.conditions["Fetched"] == ("False", "SpaceHeldByReaders")
    assert world.conditions["Ready"] == ("True", "Serving")
    assert decision.requeue_after <= 30
    world.now += 31
    world.run("plan")
    world.run("fetch")
    assert world.conditions == READY


def test_an_evicted_or_killed_pod_of_a_running_job_is_told_and_the_job_goes_on():
    world = World()
    world.run("plan")
    [job] = world.running("fetch")
    world.pod_of(job, phase="Failed", reason="Evicted")
    world.settle()
    assert world.conditions["Fetched"] == ("False", "Evicted")
    assert world.running("fetch") == [job]


def test_servers_go_on_serving_while_the_clusters_keys_cannot_be_read():
    """As after a restart of the operator at a bad moment: nobody's model is down."""
    world = World(server={"access": {"mode": "Token", "serviceAccounts": [{"name": "app"}]}})
    world.keys = TokenKeys("https://issuer", "{}")
    world.to_ready()
    world.keys = None
    decision = world.settle()
    assert world.conditions == READY | {"UpToDate": ("False", "KeySetUnavailable")}
    assert decision.requeue_after <= 10
    world.deployment()["status"] = {}
    world.settle()
    assert world.conditions["Serving"] == ("False", "KeySetUnavailable")


def test_an_open_model_that_shall_be_closed_stays_open_while_the_clusters_keys_cannot_be_read_and_says_so():
    world = World().to_ready()
    world.change(server={"access": {"mode": "Token", "serviceAccounts": [{"name": "app"}]}})
    world.settle()
    assert world.conditions == READY | {"UpToDate": ("False", "KeySetUnavailable")}


@pytest.mark.parametrize("component", ["plan", "fetch"])
def test_a_job_whose_pod_does_not_end_with_its_node_says_so_and_lets_no_other_begin(component):
    """Kubernetes makes no other pod until a dead node is deleted; it said to be fetching for ever."""
    world = World()
    if component == "fetch":
        world.run("plan")
    world.settle()
    [job] = world.running(component)
    pod = world.pod_of(job, phase="Running")
    pod["metadata"]["deletionTimestamp"] = format_time(world.now)
    pod["spec"] = {"nodeName": "node-7"}
    world.now += 30
    world.settle()
    assert world.conditions["UpToDate"][1] in {"Planning", "Fetching"}
    world.now += 60
    world.settle()
    assert world.conditions["UpToDate"] == ("False", "PodTerminating")
    assert "node-7" in world.message("UpToDate")
    world.change(fetch={"resources": {"limits": {"memory": "1Gi"}}})
    world.settle()
    assert world.running(component) == [job], "it may still write, behind a network that broke"
    world.objects.pop(("Pod", pod["metadata"]["name"]))
    world.settle()
    assert world.conditions["UpToDate"][1] in {"Planning", "Fetching"}


def test_a_fetch_of_before_whose_pod_does_not_end_is_named_and_not_asked_about_each_second():
    world = World()
    world.run("plan")
    [old] = world.running("fetch")
    pod = world.pod_of(old, phase="Running")
    pod["metadata"]["deletionTimestamp"] = format_time(world.now)
    pod["spec"] = {"nodeName": "node-7"}
    world.change(revision="v2")
    world.run("plan")
    assert world.conditions["Fetched"] == ("False", "Waiting")
    world.now += 90
    decision = world.settle()
    assert world.conditions["Fetched"] == ("False", "PodTerminating")
    assert "node-7" in world.message("Fetched")
    assert decision.requeue_after >= 10
    assert not world.running("fetch")


def test_token_access_gives_the_servers_the_clusters_keys():
    access = {"mode": "Token", "serviceAccounts": [{"name": "app"}, {"namespace": "other", "name": "job"}]}
    world = World(server={"access": access})
    world.run("plan")
    world.run("fetch")
    assert world.conditions["Serving"] == ("False", "KeySetUnavailable")
    assert world.names("Deployment") == []
    world.keys = TokenKeys("https://issuer", '{"keys": []}')
    world.settle()
    command = world.deployment()["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "--token-issuer=https://issuer" in command
    assert "--allow=ns/app" in command
    assert "--allow=other/job" in command
    assert world.objects["ConfigMap", "bert-weights-keys"]["data"] == {"jwks.json": '{"keys": []}'}
    world.keys = TokenKeys("https://issuer", '{"keys": [1]}')
    template = world.deployment()["spec"]["template"]
    world.settle()
    assert world.objects["ConfigMap", "bert-weights-keys"]["data"] == {"jwks.json": '{"keys": [1]}'}
    assert world.deployment()["spec"]["template"] == template, "rotated keys restart no server"
    world.slots["rollout"] = False
    world.change(server={})
    world.settle()
    assert world.names("ConfigMap") == ["bert-weights-keys"], "servers that wait for their turn start with it"
    world.slots["rollout"] = True
    world.settle()
    assert world.names("ConfigMap") == []


def test_the_status_fits_the_schema():
    from modelcache_api.status import ModelCacheStatus

    world = World().to_ready()
    assert ModelCacheStatus.model_validate(world.cr["status"]).fetch is not None
    known = {"observedGeneration", "conditions", "endpoint", "volume", "revision", "digest", "files", "bytes", "size"}
    assert set(world.cr["status"]) <= known | {"server", "plan", "fetch", "progress"}
