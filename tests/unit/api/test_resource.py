"""The resource's bounds, rules and schema."""

import pytest
from pydantic import ValidationError

from modelcache_api.resource import ModelCache, ModelCacheSpec


def spec(**fields) -> dict:
    return {"repoId": "org/name", **fields}


def problems(value: dict, *, cluster: bool = False) -> dict[str, str]:
    """Field path to sentence for a refused spec; empty when it is accepted."""
    try:
        ModelCacheSpec.model_validate(value, context={"cluster": cluster})
    except ValidationError as error:
        return {".".join(map(str, item["loc"])): item["msg"].removeprefix("Value error, ") for item in error.errors()}
    return {}


def test_every_field_of_the_design_is_accepted_together():
    placement = {
        "nodeSelector": {"gpu": "no"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"x": {}},
    }
    value = spec(
        revision="refs/pr/1",
        allowPatterns=["*.safetensors"],
        ignorePatterns=["*.bin"],
        secretRef={"name": "hf-token"},
        endpoint="https://hub.example.com/base",
        refresh={"interval": "1h30m"},
        storage={
            "size": "20Gi",
            "storageClassName": "fast",
            "accessModes": ["ReadWriteMany"],
            "reclaimPolicy": "Retain",
        },
        fetch={
            **placement,
            "resources": {"limits": {"memory": "256Mi", "cpu": 2}},
            "serviceAccountName": "fetcher",
            "imagePullSecrets": [{"name": "pull"}],
            "env": [
                {"name": "HTTPS_PROXY", "value": "http://p:1"},
                {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            ],
            "caBundle": {"configMap": "ca", "key": "ca.pem"},
            "activeDeadlineSeconds": 3600,
            "stallTimeout": "30s",
            "backoffLimit": 0,
            "concurrency": 16,
        },
        server={
            **placement,
            "replicas": 0,
            "cacheSize": "1Gi",
            "redis": {"secretRef": {"name": "redis"}, "ttl": "1h"},
            "warmup": False,
            "resources": {"limits": {"memory": "1280Mi"}},
            "topologySpreadConstraints": [{"maxSkew": 1}],
            "access": {"mode": "Token", "serviceAccounts": [{"name": "default"}], "tls": {"secretName": "tls"}},
        },
        revisionHistoryLimit=3,
        suspend=True,
    )
    model = ModelCacheSpec.model_validate(value, context={"cluster": True})
    dumped = model.model_dump(by_alias=True, exclude_unset=True)
    assert dumped["server"]["access"]["tls"] == {"secretName": "tls"}
    assert dumped["fetch"]["resources"]["limits"] == {"memory": "256Mi", "cpu": "2"}
    assert model.server.cache_bytes == 2**30
    assert model.server.access.audience == "modelcache.io"
    assert ModelCacheSpec.model_validate(dumped) == model


def test_fields_of_a_newer_version_do_not_break_an_older_operator():
    assert ModelCacheSpec.model_validate(spec(fromTheFuture=1, server={"alsoNew": {}})).server.replicas == 1


@pytest.mark.parametrize("name", ["bert", "a", "b-2", "x" * 40])
def test_names_that_services_can_carry(name):
    assert ModelCache.model_validate({"metadata": {"name": name}, "spec": spec()}).metadata.name == name


@pytest.mark.parametrize("name", ["", "Bert", "2b", "a_b", "a.b", "-a", "a-", "x" * 41, "a\n", "ä"])
def test_names_that_services_cannot_carry(name):
    with pytest.raises(ValidationError):
        ModelCache.model_validate({"metadata": {"name": name}, "spec": spec()})


@pytest.mark.parametrize(
    ("fields", "where", "part"),
    [
        ({"repoId": "s3://bucket/p", "revision": "main"}, "revision", "only a Hugging Face repo"),
        ({"repoId": "file:///m", "endpoint": "http://x:1"}, "endpoint", "take it away"),
        ({"repoId": "file:///m", "secretRef": {"name": "s"}}, "secretRef", "take it away"),
        ({"storage": {"accessModes": ["ReadWriteOncePod"]}}, "storage.accessModes", "write ReadWriteOnce or"),
        ({"storage": {"accessModes": ["ReadOnlyMany"]}}, "storage.accessModes", "a fetch writes"),
        ({"storage": {"accessModes": ["rwx"]}}, "storage.accessModes", "'rwx' is unknown"),
        ({"storage": {"existingClaim": "c", "size": "1Gi"}}, "storage.size", "take size away"),
        ({"fetch": {"nodeSelector": {"a": "b"}}}, "fetch.nodeSelector", "write server.nodeSelector instead"),
        ({"fetch": {"tolerations": [{"operator": "Exists"}]}}, "fetch.tolerations", "server.tolerations"),
        ({"fetch": {"affinity": {"a": {}}}}, "fetch.affinity", "server.affinity"),
        ({"server": {"topologySpreadConstraints": [{}]}}, "server.topologySpreadConstraints", "cannot spread"),
        (
            {"server": {"cacheSize": "1Gi", "resources": {"limits": {"memory": "1279Mi"}}}},
            "server.resources.limits.memory",
            "write at least 1280Mi",
        ),
        (
            {"server": {"resources": {"limits": {"memory": "300Mi"}}}},
            "server.resources.limits.memory",
            "write at least 320Mi",
        ),
        ({"server": {"warmup": False, "warmupSize": "1Gi"}}, "server.warmupSize", "take warmupSize away"),
        ({"server": {"access": {"mode": "Token"}}}, "server.access.serviceAccounts", "at least one"),
        ({"server": {"access": {"serviceAccounts": [{"name": "a"}]}}}, "server.access.serviceAccounts", "mode: Token"),
    ],
)
def test_rules_between_fields_say_what_to_write(fields, where, part):
    found = problems(spec(**fields))
    assert list(found) == [where]
    assert part in found[where]


def test_several_broken_rules_are_all_told():
    assert len(problems(spec(repoId="gs://bucket", revision="x", server={"access": {"mode": "Token"}}))) == 2


def test_a_folder_is_for_one_machine_only():
    assert problems(spec(repoId="file:///model")) == {}
    assert "modelcache up" in problems(spec(repoId="file:///model"), cluster=True)["repoId"]


@pytest.mark.parametrize(
    ("fields", "where", "part"),
    [
        ({"server": {"cacheSize": "60Mi"}}, "server.cacheSize", "at least 64Mi"),
        ({"server": {"cacheSize": "65Mi"}}, "server.cacheSize", "write 68Mi"),
        ({"server": {"cacheSize": "0"}}, "server.cacheSize", "more than 0"),
        ({"server": {"warmupSize": "0"}}, "server.warmupSize", "more than 0"),
        ({"storage": {"size": "-1Gi"}}, "storage.size", "more than 0"),
        ({"storage": {"size": "20GB"}}, "storage.size", "no quantity"),
        ({"refresh": {"interval": "4m59s"}}, "refresh.interval", "write 5m or more"),
        ({"refresh": {"interval": "10 m"}}, "refresh.interval", "no duration"),
        ({"fetch": {"stallTimeout": "500ms"}}, "fetch.stallTimeout", "1s or more"),
        ({"fetch": {"concurrency": 0}}, "fetch.concurrency", "greater than or equal to 1"),
        ({"endpoint": "ftp://x.example"}, "endpoint", "no http:// or https:// URL"),
        ({"endpoint": "https://"}, "endpoint", "no http:// or https:// URL"),
        ({"endpoint": "https://h:99999"}, "endpoint", "no http:// or https:// URL"),
        ({"endpoint": "https://user:pass@h.example"}, "endpoint", "secretRef"),
        ({"endpoint": "https://h.example/?token=1"}, "endpoint", "query"),
        ({"allowPatterns": ["/a"]}, "allowPatterns.0", "can match nothing"),
        ({"revision": "a b"}, "revision", "no branch"),
        ({"revision": "../x"}, "revision", "no branch"),
        ({"revision": "-x"}, "revision", "no branch"),
        ({"revisionHistoryLimit": -1}, "revisionHistoryLimit", "greater than or equal to 0"),
        ({"suspend": 1}, "suspend", "boolean"),
    ],
)
def test_values_outside_their_bounds_are_refused(fields, where, part):
    found = problems(spec(**fields))
    assert list(found) == [where]
    assert part in found[where]


def test_a_secret_in_an_endpoint_is_not_repeated():
    with pytest.raises(ValidationError) as caught:
        ModelCacheSpec.model_validate(spec(endpoint="https://user:hunter2@h.example"))
    assert "hunter2" not in caught.value.errors()[0]["msg"]


def _walk(node, path, definitions):
    """Every schema below a node with its path, references followed."""
    if "$ref" in node:
        node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
    yield path, node
    if node.get("x-kubernetes-int-or-string"):
        return
    for option in node.get("anyOf", []):
        yield from _walk(option, path, definitions)
    for name, child in node.get("properties", {}).items():
        yield from _walk(child, f"{path}.{name}", definitions)
    for inner in ("items", "additionalProperties"):
        if isinstance(node.get(inner), dict):
            yield from _walk(node[inner], f"{path}[]", definitions)


def test_the_schema_documents_and_bounds_every_field_and_needs_no_unions():
    schema = ModelCacheSpec.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    for path, node in _walk(schema, "spec", definitions):
        for name, child in node.get("properties", {}).items():
            described = child if "description" in child else definitions[child["$ref"].rsplit("/", 1)[1]]
            assert described["description"], f"{path}.{name} has no description"
        if node.get("x-kubernetes-int-or-string"):
            continue
        kinds = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
        assert len(kinds) <= 1, f"{path} is a union"
        assert "const" not in node, f"{path} is a constant"
        match node.get("type"):
            case "string":
                assert "maxLength" in node or "enum" in node, f"{path} is unbounded"
            case "array":
                assert "maxItems" in node, f"{path} is unbounded"
            case "object" if "properties" not in node and node.get("additionalProperties") is not True:
                assert "maxProperties" in node, f"{path} is unbounded"
