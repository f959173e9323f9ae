import yaml

from modelcache_api import crd
from modelcache_api.celrules import VALIDATIONS


def nodes(schema, path="openAPIV3Schema"):
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from nodes(part, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}.{key}")


def test_the_checked_in_file_is_what_the_models_say():
    assert crd.main(["--check"]) == 0


def test_a_stale_file_is_noticed_and_not_written(tmp_path):
    stale = tmp_path / "crd.yaml"
    stale.write_text("old\n")
    assert crd.main(["--check", str(stale)]) == 1
    assert stale.read_text() == "old\n"
    assert crd.main([str(stale)]) == 0
    assert yaml.safe_load(stale.read_text()) == crd.custom_resource_definition()


def test_every_part_of_the_schema_is_structural_and_described():
    forbidden = {"$ref", "title", "const", "oneOf", "discriminator", "propertyNames", "uniqueItems"}
    for path, node in nodes(crd.open_api_schema()):
        assert not forbidden & node.keys(), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert node.get("default", 0) is not None, path
        named = not path.endswith((".items", ".additionalProperties", ".metadata"))
        assert not named or node.get("description"), f"kubectl explain says nothing about {path}"


def test_every_string_list_and_map_of_the_spec_is_bounded():
    for path, node in nodes(crd.open_api_schema()["properties"]["spec"], "spec"):
        match node.get("type"):
            case "string":
                assert "enum" in node or "maxLength" in node, path
            case "array":
                assert "maxItems" in node, path
            case "object" if isinstance(node.get("additionalProperties"), dict):
                assert "maxProperties" in node, path


def test_nested_defaults_are_filled_in_by_the_api_server():
    spec = crd.open_api_schema()["properties"]["spec"]["properties"]
    assert spec["server"]["default"] == {}
    assert spec["server"]["properties"]["replicas"]["default"] == 1
    assert spec["storage"]["properties"]["accessModes"]["default"] == ["ReadWriteOnce"]
    assert "default" not in spec["storage"]["properties"]["size"]


def test_versions_can_be_added_one_stores_and_nothing_is_fixed_about_conversion():
    spec = crd.custom_resource_definition()["spec"]
    assert [version["name"] for version in spec["versions"] if version["storage"]] == ["v1alpha1"]
    assert all(version["served"] and version["schema"] for version in spec["versions"])
    assert "conversion" not in spec


def test_rules_say_what_to_write_instead():
    for path, rules in VALIDATIONS.items():
        for rule in rules:
            assert len(rule.message) > 30, f"{path}: {rule.message}"
