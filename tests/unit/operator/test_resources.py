"""The objects that a ModelCache owns, field by field: what each line of the spec does to them."""

import json

import pytest

from modelcache_api.reasons import REASONS, Reason
from modelcache_api.resource import ModelCacheSpec
from modelcache_fetcher.trust import CA_BUNDLE
from modelcache_operator.comparison import covers
from modelcache_operator.resources import claim, jobs, names, server
from modelcache_operator.resources.effective import effective
from modelcache_operator.resources.jobs import JobId
from modelcache_operator.settings import Defaults, Settings

CR = {"metadata": {"name": "bert", "namespace": "ns", "uid": "u1", "generation": 1}}
SETTINGS = Settings(image="modelcache:1")
GIB = 2**30


def spec(defaults=None, **fields):
    return effective(ModelCacheSpec.model_validate({"repoId": "org/name"} | fields), defaults or Defaults())


def plan_job(**fields):
    return jobs.plan_job(CR, spec(**fields), SETTINGS, JobId("plan", "k", 1, "", 1))


def fetch_job(*, many_nodes=False, settings=SETTINGS, defaults=None, **fields):
    job = JobId("fetch", "k", 1, "uid", 1)
    return jobs.fetch_job(CR, spec(defaults, **fields), settings, job, claim="bert-weights", many_nodes=many_nodes)


def deployment(*, many_nodes=False, cache=64 * 2**20, settings=SETTINGS, defaults=None, keys=None, **fields):
    return server.deployment(
        CR, spec(defaults, **fields), settings, claim="bert-weights", many_nodes=many_nodes, cache=cache,
        replicas=1, keys=keys,
    )  # fmt: skip


def pod_of(obj):
    return obj["spec"]["template"]["spec"]


def main_of(obj):
    [container] = pod_of(obj)["containers"]
    return container


EVERYTHING = {
    "secretRef": {"name": "s"},
    "fetch": {"caBundle": {"configMap": "ca"}, "serviceAccountName": "cloud"},
    "server": {"redis": {"secretRef": {"name": "r"}}, "access": {"tls": {"secretName": "t"}}},
}
BUILT = {"plan": plan_job(**EVERYTHING), "fetch": fetch_job(**EVERYTHING), "server": deployment(**EVERYTHING)}


@pytest.mark.parametrize("obj", BUILT.values(), ids=BUILT.keys())
def test_pods_pass_the_restricted_pod_security_standard_and_have_no_token(obj):
    pod, container = pod_of(obj), main_of(obj)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert all(set(v) & {"persistentVolumeClaim", "secret", "configMap", "emptyDir"} for v in pod["volumes"])
    assert "hostNetwork" not in pod
    assert container["resources"]["limits"]["memory"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("obj", BUILT.values(), ids=BUILT.keys())
def test_secrets_come_as_optional_files_and_never_in_the_environment(obj):
    secrets = [v["secret"] for v in pod_of(obj)["volumes"] if "secret" in v]
    assert secrets
    assert all(s["optional"] for s in secrets)
    assert not any("valueFrom" in e for e in main_of(obj).get("env", []))


@pytest.mark.parametrize("obj", BUILT.values(), ids=BUILT.keys())
def test_children_belong_to_their_model_cache_and_hold_up_no_deletion(obj):
    [owner] = obj["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (
        "ModelCache", "u1", True, False
    )  # fmt: skip
    assert obj["metadata"]["labels"][names.NAME_LABEL] == "bert"


def test_an_openshift_chart_leaves_the_users_to_the_platform():
    settings = Settings(image="i", defaults=Defaults(run_as_user=None, fs_group=None))
    for obj in (fetch_job(settings=settings), deployment(settings=settings)):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod_of(obj)["securityContext"].keys()


# --- Jobs


def test_a_jobs_name_hashes_what_it_does_and_not_the_image():
    first = fetch_job()["metadata"]["name"]
    assert fetch_job(settings=Settings(image="modelcache:2"))["metadata"]["name"] == first
    others = [JobId("fetch", "k2", 1, "uid", 1), JobId("fetch", "k", 2, "uid", 1), JobId("fetch", "k", 1, "uid2", 1)]
    assert len({first, *(job.name("bert") for job in others), JobId("fetch", "k", 1, "uid", 2).name("bert")}) == 5
    assert len(JobId("fetch", "k", 10**6, "uid", 9999).name("b" * 40)) <= 63


@pytest.mark.parametrize(
    ("change", "other_plan"),
    [
        ({"repoId": "org/other"}, True),
        ({"revision": "v2"}, True),
        ({"endpoint": "http://hub:1"}, True),
        ({"allowPatterns": ["*.json"]}, True),
        ({"ignorePatterns": ["*.json"]}, True),
        ({"repoId": "hf://org/name"}, False),
        ({"revision": "main"}, False),
        ({"server": {"replicas": 3}}, False),
        ({"secretRef": {"name": "s"}}, False),
        ({"revisionHistoryLimit": 5}, False),
    ],
)
def test_what_asks_for_a_new_plan(change, other_plan):
    assert (names.plan_key(spec(**change)) != names.plan_key(spec())) is other_plan


def test_the_order_of_patterns_asks_for_nothing_new():
    one, two = spec(allowPatterns=["a", "b"]), spec(allowPatterns=["b", "a"])
    assert names.plan_key(one) == names.plan_key(two)
    assert names.plan_key(spec(allowPatterns=["a"])) != names.plan_key(spec(ignorePatterns=["a"]))


def test_the_job_gets_the_spec_that_its_program_reads():
    fields = {
        "revision": "v1",
        "allowPatterns": ["*.json"],
        "ignorePatterns": ["x/*"],
        "endpoint": "http://hub",
        "revisionHistoryLimit": 7,
        "fetch": {"concurrency": 3, "stallTimeout": "1m", "activeDeadlineSeconds": 9},
    }
    [variable] = main_of(fetch_job(**fields))["env"]
    given = ModelCacheSpec.model_validate(json.loads(variable["value"]))
    assert (given.revision, given.allow_patterns, given.fetch.concurrency) == ("v1", ["*.json"], 3)
    assert (given.fetch.stall_timeout, given.fetch.active_deadline_seconds) == ("1m", 9)
    assert (given.ignore_patterns, given.endpoint, given.revision_history_limit) == (["x/*"], "http://hub", 7)
    assert "server" not in variable["value"]


def test_permanent_exit_codes_end_the_job_and_evictions_do_not_count():
    rules = fetch_job(fetch={"backoffLimit": 7})["spec"]["podFailurePolicy"]["rules"]
    codes = rules[0]["onExitCodes"]
    assert codes["containerName"] == main_of(fetch_job())["name"]
    assert REASONS[Reason.AUTH_FAILED].exit_code in codes["values"]
    assert REASONS[Reason.RATE_LIMITED].exit_code not in codes["values"]
    assert 0 not in codes["values"]
    assert codes["values"] == sorted(codes["values"])
    assert rules[1]["action"] == "Ignore"
    assert fetch_job(fetch={"backoffLimit": 7})["spec"]["backoffLimit"] == 7
    assert pod_of(fetch_job())["restartPolicy"] == "Never"


def test_every_field_of_fetch_is_honoured():
    fields = {
        "storage": {"accessModes": ["ReadWriteMany"]},
        "secretRef": {"name": "hf"},
        "fetch": {
            "resources": {"limits": {"memory": "1Gi"}},
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "serviceAccountName": "cloud",
            "imagePullSecrets": [{"name": "pull"}],
            "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}, {"name": "NO_PROXY", "value": "x"}],
            "caBundle": {"configMap": "ca", "key": "root.pem"},
            "activeDeadlineSeconds": 99,
        },
    }
    job = fetch_job(many_nodes=True, **fields)
    pod, container = pod_of(job), main_of(job)
    assert container["resources"] == {"limits": {"memory": "1Gi"}}
    assert pod["nodeSelector"] == {"disk": "fast"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert pod["serviceAccountName"] == "cloud"
    assert pod["automountServiceAccountToken"] is False
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["HTTPS_PROXY"] == "http://proxy"
    assert environment["MODELCACHE_CA_BUNDLE"] == "/etc/modelcache/ca/ca.crt"
    assert CA_BUNDLE == "MODELCACHE_CA_BUNDLE"
    assert not {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"} & environment.keys(), "public ones stay trusted"
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["ca"]["configMap"] == {"name": "ca", "items": [{"key": "root.pem", "path": "ca.crt"}]}
    assert volumes["secrets"]["secret"] == {"secretName": "hf", "optional": True}
    assert "--secrets=/etc/modelcache/secrets" in container["command"]
    assert job["spec"]["activeDeadlineSeconds"] == 99


def test_on_a_volume_of_one_node_fetches_go_where_the_servers_go():
    fields = {
        "server": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "t"}], "affinity": {"nodeAffinity": {"x": 1}}}
    }
    job, servers = pod_of(fetch_job(**fields)), pod_of(deployment(**fields))
    for part in ("nodeSelector", "tolerations", "affinity"):
        assert job[part] == servers[part]
    [term] = job["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    wanted = term["labelSelector"]["matchLabels"]
    assert job["affinity"]["nodeAffinity"] == {"x": 1}
    for obj in (fetch_job(**fields), deployment(**fields)):
        assert wanted.items() <= obj["spec"]["template"]["metadata"]["labels"].items()
    assert "topologySpreadConstraints" not in servers


def test_the_users_own_pod_affinity_stays():
    own = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]}}
    terms = pod_of(deployment(server={"affinity": own}))["affinity"]["podAffinity"]
    assert len(terms["requiredDuringSchedulingIgnoredDuringExecution"]) == 2
    assert len(own["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]) == 1


def test_on_a_shared_volume_servers_spread_by_default_or_as_they_are_told():
    modes = {"storage": {"accessModes": ["ReadWriteMany"]}}
    [constraint] = pod_of(deployment(many_nodes=True, **modes))["topologySpreadConstraints"]
    assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
    own = [{"maxSkew": 2}]
    told = deployment(many_nodes=True, server={"topologySpreadConstraints": own}, **modes)
    assert pod_of(told)["topologySpreadConstraints"] == own


def test_the_budget_knows_the_source_by_its_host():
    assert jobs.source_host(spec()) == "huggingface.co"
    assert jobs.source_host(spec(repoId="s3://bucket/x")) == "amazonaws.com"
    assert jobs.source_host(spec(endpoint="http://minio:9000")) == "minio:9000"


# --- the claim


@pytest.mark.parametrize(
    ("active", "incoming", "size", "wanted"),
    [
        (0, 0, None, GIB),
        (0, 90 * 2**20, None, GIB),
        (0, GIB, None, 2 * GIB),
        (10 * GIB, 10 * GIB, None, 23 * GIB),
        (0, 10 * GIB, "5Gi", 5 * GIB),
        (10 * GIB, 10 * GIB, "50G", 50 * 10**9),
    ],
)
def test_how_large_a_volume_is(active, incoming, size, wanted):
    storage = {"storage": {"size": size}} if size else {}
    assert claim.needed_bytes(spec(**storage), active=active, incoming=incoming) == wanted


def test_a_claim_as_it_is_first_made():
    built = claim.build(CR, spec(storage={"storageClassName": "fast"}), size=3 * GIB, live=None, grown_at="")
    assert built["spec"] == {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "3Gi"}}, "storageClassName": "fast"
    }  # fmt: skip
    assert built["metadata"]["name"] == "bert-weights"


def test_what_a_claim_cannot_change_is_taken_from_the_live_one():
    live = {"spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "old"}}
    built = claim.build(CR, spec(Defaults(storage_class_name="new")), size=3 * GIB, live=live, grown_at="")
    assert built["spec"]["storageClassName"] == "old"
    assert built["spec"]["accessModes"] == ["ReadWriteMany"]


# --- servers


@pytest.mark.parametrize(
    ("fields", "planned", "live", "wanted"),
    [
        ({}, 10, None, 64),
        ({}, 90 * 2**20, None, 92),
        ({}, 10 * GIB, None, 1024),
        ({"cacheSize": "2Gi"}, 10, None, 2048),
        ({"resources": {"limits": {"memory": "512Mi"}}}, 10 * GIB, None, 256),
        ({}, 10 * GIB, 92 * 2**20, 92),
        ({"cacheSize": "128Mi"}, 10 * GIB, 92 * 2**20, 128),
    ],
)
def test_how_large_a_cache_is(fields, planned, live, wanted):
    deployed = {"metadata": {"annotations": {names.CACHE_SIZE_ANNOTATION: str(live)}}} if live else None
    assert server.cache_bytes(spec(server=fields), planned, deployed) == wanted * 2**20


def test_every_field_of_server_is_honoured():
    keys = server.TokenKeys("https://issuer", "{}")
    built = deployment(
        keys=keys,
        cache=128 * 2**20,
        server={
            "warmup": False,
            "redis": {"secretRef": {"name": "r"}, "ttl": "1h"},
            "resources": {"limits": {"memory": "1Gi"}, "requests": {"cpu": 2}},
            "access": {
                "mode": "Token", "serviceAccounts": [{"name": "a"}], "audience": "aud", "tls": {"secretName": "t"}
            },
        },
    )  # fmt: skip
    command = main_of(built)["command"]
    for argument in (
        f"--cache-size={128 * 2**20}", "--warmup=none", "--redis-url-file=/etc/modelcache/redis/redis_url",
        "--redis-ttl=3600", "--tls-cert=/etc/modelcache/tls/tls.crt", "--tls-key=/etc/modelcache/tls/tls.key",
        "--token-audience=aud", "--token-issuer=https://issuer", "--allow=ns/a", "--name=bert",
    ):  # fmt: skip
        assert argument in command
    assert main_of(built)["resources"] == {"limits": {"memory": "1Gi"}, "requests": {"cpu": "2"}}


@pytest.mark.parametrize(("fields", "warmed"), [({}, None), ({"warmup": False}, 0), ({"warmupSize": "2Gi"}, 2 * GIB)])
def test_a_server_warms_up_what_the_spec_says(fields, warmed):
    from modelcache_server import options

    (given,) = (part for part in main_of(deployment(server=fields))["command"] if part.startswith("--warmup="))
    assert options.parse_warmup(given.removeprefix("--warmup=")) == warmed


def test_the_command_lines_are_those_that_the_programs_take():
    import argparse

    from modelcache_fetcher.__main__ import _parser
    from modelcache_server import options

    for job in (plan_job(**EVERYTHING), fetch_job(**EVERYTHING)):
        _parser().parse_args(main_of(job)["command"][1:])
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    keys = server.TokenKeys("https://issuer", "{}")
    access = {"mode": "Token", "serviceAccounts": [{"name": "a"}]}
    parser.parse_args(
        main_of(deployment(keys=keys, server={"access": access, "redis": {"secretRef": {"name": "r"}}}))["command"][1:]
    )


def test_the_server_may_write_leases_and_nothing_else():
    mounts = {m["mountPath"]: m for m in main_of(deployment())["volumeMounts"]}
    assert mounts["/volume"]["readOnly"] is True
    assert "readOnly" not in mounts["/volume/leases"]
    assert mounts["/volume/leases"]["subPath"] == "leases"


def test_a_rolling_update_never_takes_a_server_away_first_and_gives_reads_time_to_end():
    built = deployment()
    assert built["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    command = main_of(built)["command"]
    assert "--drain=10" in command
    assert pod_of(built)["terminationGracePeriodSeconds"] > 30


def test_selectors_have_no_version_in_them_and_services_find_the_pods():
    built = deployment()
    labels = built["spec"]["template"]["metadata"]["labels"]
    assert built["spec"]["selector"]["matchLabels"].items() <= labels.items()
    balanced, headless = server.services(CR, spec())
    for service in (balanced, headless):
        assert service["spec"]["selector"] == built["spec"]["selector"]["matchLabels"]
    assert [s["metadata"]["name"] for s in (balanced, headless)] == ["bert-weights", "bert-weights-pods"]
    assert headless["spec"]["clusterIP"] == "None"


def test_services_say_what_is_spoken_for_gateways_and_meshes():
    def spoken(**fields):
        return [
            [port.get("appProtocol") for port in s["spec"]["ports"][:2]] for s in server.services(CR, spec(**fields))
        ]

    assert spoken() == [["kubernetes.io/h2c", "http"]] * 2
    tls = {"access": {"tls": {"secretName": "t"}}}
    assert spoken(server=tls) == [["https", "https"]] * 2, "who takes it for plain text would break it"


# --- the chart's defaults


def test_defaults_apply_where_the_spec_says_nothing():
    defaults = Defaults.model_validate(
        {
            "endpoint": "https://mirror.example.com",
            "storageClassName": "fast",
            "imagePullSecrets": [{"name": "pull"}],
            "caBundle": {"configMap": "ca"},
            "env": [{"name": "HTTPS_PROXY", "value": "chart"}, {"name": "NO_PROXY", "value": "chart"}],
            "fetchResources": {"limits": {"memory": "300Mi"}},
            "serverResources": {"limits": {"memory": "3Gi"}},
            "tolerations": [{"key": "t"}],
        }
    )
    silent = spec(defaults, fetch={"env": [{"name": "HTTPS_PROXY", "value": "own"}]})
    assert silent.endpoint == "https://mirror.example.com"
    assert silent.storage.storage_class_name == "fast"
    assert {e.name: e.value for e in silent.fetch.env} == {"NO_PROXY": "chart", "HTTPS_PROXY": "own"}
    assert silent.fetch.resources.limits == {"memory": "300Mi"}
    assert silent.server.resources.limits == {"memory": "3Gi"}
    assert silent.server.tolerations[0].key == "t"
    own = spec(defaults, endpoint="https://own.example.com", storage={"storageClassName": "slow"})
    assert own.endpoint == "https://own.example.com"
    assert own.storage.storage_class_name == "slow"
    assert spec(defaults, repoId="s3://bucket").endpoint is None, "a hub's mirror is no S3 service"
    assert spec(defaults, storage={"existingClaim": "c"}).storage.storage_class_name is None


def test_a_default_limit_of_memory_makes_room_for_the_cache_that_is_asked_for():
    """The arena is allocated whole: the API server checks only limits that stand in the spec itself."""
    defaults = Defaults.model_validate({"serverResources": {"limits": {"memory": "1Gi", "cpu": "2"}}})
    built = deployment(defaults=defaults, server={"cacheSize": "4Gi"})
    assert main_of(built)["resources"]["limits"] == {"memory": "4352Mi", "cpu": "2"}
    assert main_of(deployment(defaults=defaults))["resources"]["limits"]["memory"] == "1Gi"


# --- comparing with what is


def test_covers_ignores_what_the_api_server_adds_and_notices_what_is_missing():
    wanted = deployment(server={"resources": {"limits": {"memory": "1024Mi", "cpu": "1000m"}}})
    live = json.loads(json.dumps(wanted))
    live["spec"]["progressDeadlineSeconds"] = 600
    container = live["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = {"limits": {"memory": "1Gi", "cpu": "1"}}
    container["ports"][0]["hostPort"] = 0
    container["terminationMessagePath"] = "/dev/termination-log"
    live["spec"]["template"]["spec"]["containers"].insert(0, {"name": "mesh"})
    assert covers(live, wanted)
    for change in (
        lambda o: o["spec"].update(replicas=9),
        lambda o: o["spec"]["template"]["spec"]["containers"][1]["command"].append("--more"),
        lambda o: o["spec"]["template"]["spec"]["containers"][1].pop("livenessProbe"),
        lambda o: o["spec"]["template"]["spec"]["containers"][1]["resources"]["limits"].update(memory="2Gi"),
        lambda o: o["spec"]["template"]["spec"]["volumes"].pop(),
        lambda o: o["metadata"]["labels"].pop(names.NAME_LABEL),
    ):
        drifted = json.loads(json.dumps(live))
        change(drifted)
        assert not covers(drifted, wanted)
