"""What the API server does with the CRD: refusals with sentences, defaults, immutability, scale, field selectors."""

import pytest
import yaml
from pydantic import ValidationError

from modelcache_api import crd
from modelcache_api.resource import ModelCacheSpec
from support.api_server import Refused, api_server

COLLECTION = "/apis/modelcache.io/v1alpha1/namespaces/default/modelcaches"


@pytest.fixture(scope="module")
def server():
    with api_server() as running:
        running.install_crd(yaml.safe_load(crd.DEFAULT_PATH.read_text()))
        yield running


def model_cache(name="bert", **spec):
    body = {"repoId": "org/name"} | spec
    return {"apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "metadata": {"name": name}, "spec": body}


BAD = [
    ({"name": "b" * 41}, "at most 40 characters"),
    ({"name": "1bert"}, "beginning with a letter"),
    ({"repoId": "file:///x"}, "`modelcache up` on one machine"),
    ({"repoId": "https://x/y"}, "another hub's address belongs in endpoint"),
    ({"repoId": "a--b/c"}, "cannot contain '--'"),
    ({"repoId": "s3://bucket/x", "revision": "v1"}, "a bucket is identified by its listing"),
    ({"revision": "a b"}, "must be a branch, tag or commit"),
    ({"revision": "a..b"}, "must be a branch, tag or commit"),
    ({"allowPatterns": ["/x"]}, "inside the repo"),
    ({"endpoint": "http://user:password@hub"}, "without credentials"),
    ({"endpoint": "ftp://hub.example.com"}, "http:// or https://"),
    ({"refresh": {"interval": "1m"}}, "at least 5m"),
    ({"refresh": {"interval": "ten minutes"}}, "at least 5m"),
    ({"storage": {"size": "0"}}, "positive quantity"),
    ({"storage": {"size": -5}}, "positive quantity"),
    ({"storage": {"size": "auto"}}, "positive quantity"),
    ({"storage": {"accessModes": ["ReadWriteOncePod"]}}, "lets only one pod mount"),
    ({"storage": {"accessModes": ["ReadOnlyMany"]}}, "a fetch writes"),
    ({"storage": {"existingClaim": "x", "size": "1Gi"}}, "take size away"),
    ({"storage": {"existingClaim": "x", "storageClassName": "y"}}, "take storageClassName away"),
    ({"fetch": {"nodeSelector": {"a": "b"}}}, "write server.nodeSelector instead"),
    ({"fetch": {"tolerations": [{"key": "a"}]}}, "write server.tolerations instead"),
    ({"fetch": {"affinity": {"nodeAffinity": {}}}}, "write server.affinity instead"),
    ({"fetch": {"stallTimeout": "0s"}}, "at least 1s"),
    ({"server": {"topologySpreadConstraints": [{"maxSkew": 1}]}}, "replicas cannot spread"),
    ({"server": {"resources": {"limits": {"memory": "300Mi"}}}}, "limits.memory is too little"),
    ({"server": {"cacheSize": "1Gi", "resources": {"limits": {"memory": "1279Mi"}}}}, "limits.memory is too little"),
    ({"server": {"warmup": False, "warmupSize": "1Gi"}}, "take warmupSize away"),
    ({"server": {"warmupSize": "-1Gi"}}, "warmupSize must be a positive quantity"),
    ({"server": {"cacheSize": "65Mi"}}, "multiple of 4Mi"),
    ({"server": {"cacheSize": "32Mi"}}, "at least 64Mi"),
    ({"server": {"access": {"mode": "Token"}}}, "write at least one"),
    ({"server": {"access": {"serviceAccounts": [{"name": "x"}]}}}, "write mode: Token"),
    ({"server": {"cachesize": "1Gi"}}, 'unknown field "spec.server.cachesize"'),
]


# What `modelcache_api` refuses as well: the API server must not take it, or it becomes InvalidSpec only later.
BAD_SOURCES = [
    "org/" + "n" * 93, "hf://org/" + "n" * 93, "org/name@v1", "a/b/c", "a..b/c", "/org/name", "ftp://x/y", "s3://",
    "s3://ab", "s3://Bucket", "s3://bucket_x", "s3://" + "b" * 64, "s3://a..b", "gs://a..b/c", "gs://" + "b" * 223,
    "s3://bucket//x", "s3://bucket/a//b", "s3://bucket/./b", "s3://bucket/a/../b", "gcs://bucket/a/.", "gs://bucket/..",
    "s3://bucket/../",
]  # fmt: skip
BAD_REVISIONS = [
    "a//b", "a/", "a.", "a.lock", "a@{1}", "/a", "-a", ".a", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a b"
]  # fmt: skip
GOOD_SOURCES = [
    "org/" + "n" * 92, "gpt2", "hf://gpt2", "org/a.b_c-d", "s3://abc", "s3://bucket/", "s3://bucket/a/b/",
    "s3://bucket//", "s3://bucket/...", "s3://bucket/a..b/.hidden/x", "gs://bucket_x/%2F x", "gcs://" + "b" * 222,
    "s3://b.c-d/" + "p" * 900,
]  # fmt: skip
GOOD_REVISIONS = ["main", "v1.0", "refs/pr/1", "a" * 40, "feature/x_y", "1.2.3+cu", "a@b"]


def is_valid(**fields):
    try:
        ModelCacheSpec.model_validate({"repoId": "org/name"} | fields, context={"cluster": True})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("field", "value", "is_good"),
    [
        *(("repoId", value, False) for value in BAD_SOURCES),
        *(("repoId", value, True) for value in GOOD_SOURCES),
        *(("revision", value, False) for value in BAD_REVISIONS),
        *(("revision", value, True) for value in GOOD_REVISIONS),
    ],
)
def test_the_api_server_and_the_operator_judge_alike(server, field, value, is_good):
    assert is_valid(**{field: value}) is is_good
    made = model_cache(**{field: value})
    if is_good:
        server.create(f"{COLLECTION}?dryRun=All", made)
        return
    with pytest.raises(Refused) as refusal:
        server.create(f"{COLLECTION}?dryRun=All", made)
    assert any(words in refusal.value.message for words in ("write ", "such as", "cannot contain"))


@pytest.mark.parametrize(("fields", "sentence"), BAD, ids=[str(fields)[:60] for fields, _ in BAD])
def test_a_bad_spec_is_refused_with_what_to_write_instead(server, fields, sentence):
    with pytest.raises(Refused) as refusal:
        server.create(f"{COLLECTION}?dryRun=All&fieldValidation=Strict", model_cache(**fields))
    assert sentence in refusal.value.message


GOOD = [
    {"repoId": "gpt2"},
    {"repoId": "hf://org/name", "revision": "refs/pr/1"},
    {"repoId": "s3://bucket-1/some/prefix"},
    {"repoId": "gcs://bucket_x"},
    {"storage": {"size": "20Gi"}},
    {"storage": {"size": 5_000_000_000}},
    {"storage": None, "revision": None},
    {
        "storage": {"accessModes": ["ReadWriteMany"]},
        "fetch": {"nodeSelector": {"a": "b"}, "affinity": {"podAffinity": {}}},
    },
    {"server": {"cacheSize": "1Gi", "resources": {"limits": {"memory": "1280Mi", "cpu": 1}}}},
    {"server": {"access": {"mode": "Token", "serviceAccounts": [{"name": "default"}]}}},
    {"refresh": {"interval": "1h30m"}, "endpoint": "http://hub.models.svc:8080"},
]


@pytest.mark.parametrize("fields", GOOD, ids=[str(fields)[:60] for fields in GOOD])
def test_a_good_spec_is_taken(server, fields):
    server.create(f"{COLLECTION}?dryRun=All&fieldValidation=Strict", model_cache(**fields))


def test_defaults_are_filled_in(server):
    spec = server.create(f"{COLLECTION}?dryRun=All", model_cache())["spec"]
    assert spec["server"] == {
        "replicas": 1, "resources": {}, "warmup": True, "access": {"audience": "modelcache.io", "mode": "Open"}
    }  # fmt: skip
    assert spec["storage"] == {"accessModes": ["ReadWriteOnce"], "reclaimPolicy": "Delete"}
    assert spec["fetch"]["backoffLimit"] == 4


def test_what_a_volume_cannot_change_is_immutable_and_the_rest_is_not(server):
    server.create(COLLECTION, model_cache("fixed", storage={"storageClassName": "fast"}))
    try:
        for change in ({"storageClassName": "slow"}, {"storageClassName": None}, {"existingClaim": "other"}):
            with pytest.raises(Refused, match="immutable"):
                server.merge(f"{COLLECTION}/fixed", {"spec": {"storage": change}})
        server.merge(f"{COLLECTION}/fixed", {"spec": {"storage": {"size": "9Gi", "reclaimPolicy": "Retain"}}})
        server.merge(f"{COLLECTION}/fixed", {"spec": {"repoId": "org/other", "revision": "v2"}})
    finally:
        server.delete(f"{COLLECTION}/fixed")


def test_scale_sets_the_replicas_and_specs_can_be_selected_by_repo(server):
    server.create(COLLECTION, model_cache("scaled"))
    try:
        server.merge(f"{COLLECTION}/scaled/scale", {"spec": {"replicas": 3}})
        assert server.get(f"{COLLECTION}/scaled")["spec"]["server"]["replicas"] == 3
        assert len(server.get(f"{COLLECTION}?fieldSelector=spec.repoId%3Dorg/name")["items"]) == 1
        assert not server.get(f"{COLLECTION}?fieldSelector=spec.repoId%3Dorg/other")["items"]
    finally:
        server.delete(f"{COLLECTION}/scaled")
