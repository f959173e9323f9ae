"""The CustomResourceDefinition, generated from the models: `python -m modelcache_api.crd` writes crds/modelcaches.yaml.

pydantic's JSON schema becomes a structural schema, as "Specifying a structural schema" in Kubernetes' documentation has
it: references inlined, null dropped, defaults filled in by the API server. What only two fields decide is said in CEL
(`celrules`), in the same words as `rules`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from modelcache_api.celrules import VALIDATIONS
from modelcache_api.resource import ModelCache

GROUP = "modelcache.io"
VERSION = "v1alpha1"
PLURAL = "modelcaches"
DEFAULT_PATH = Path(__file__).parents[1] / "modelcaches.yaml"

Schema = dict[str, Any]

_DROPPED = {"title", "$defs", "examples", "discriminator", "uniqueItems", "propertyNames"}
_HEADER = "# Generated from crds/modelcache_api by `python -m modelcache_api.crd`; do not edit.\n"

_COLUMNS = [
    ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', "Whether the model can be read."),
    (
        "UpToDate",
        "string",
        '.status.conditions[?(@.type=="UpToDate")].status',
        "Whether what is served is what spec asks for.",
    ),
    ("Reason", "string", '.status.conditions[?(@.type=="UpToDate")].reason', "Why it is up to date or not."),
    ("Revision", "string", ".status.revision.short", "The revision that is served."),
    ("Size", "string", ".status.size", "Size of the active snapshot."),
    ("Progress", "string", ".status.progress.percent", "How far a running fetch has come."),
    ("Age", "date", ".metadata.creationTimestamp", "When it was created."),
]


class SchemaError(Exception):
    """A model uses something that no structural schema can say; change the model."""


def structural(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Turn one JSON schema of pydantic's into a structural one.

    Args:
        schema: A schema or a part of it.
        definitions: pydantic's ``$defs``.

    Raises:
        SchemaError: A union that is not ``X | None``.
    """
    if (reference := schema.get("$ref")) is not None:
        siblings = {key: value for key, value in schema.items() if key != "$ref"}
        return structural({**definitions[reference.rpartition("/")[2]], **siblings}, definitions)
    if "anyOf" in schema and not schema.get("x-kubernetes-int-or-string"):
        options = [option for option in schema["anyOf"] if option.get("type") != "null"]
        if len(options) != 1:
            raise SchemaError(f"no structural schema can say this union: {schema}")
        siblings = {key: value for key, value in schema.items() if key != "anyOf"}
        if siblings.get("default", ...) is None:
            del siblings["default"]
        return structural({**options[0], **siblings}, definitions)
    return _converted(schema, definitions)


def _converted(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """The part of `structural` for a schema that is neither reference nor union."""
    result = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "const" in result:
        result["enum"] = [result.pop("const")]
    if "properties" in result:
        result["properties"] = {name: structural(part, definitions) for name, part in result["properties"].items()}
        result.pop("additionalProperties", None)
    elif result.get("type") == "object":
        values = result.get("additionalProperties", True)
        if isinstance(values, dict) and values:
            result["additionalProperties"] = structural(values, definitions)
        else:
            result.pop("additionalProperties", None)
            result["x-kubernetes-preserve-unknown-fields"] = True
    if isinstance(result.get("items"), dict):
        result["items"] = structural(result["items"], definitions)
    if result.get("type") == "integer":
        result.setdefault("format", "int64")
    return result


def _models(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """All models reachable from one, by class name (which is their name in ``$defs``)."""
    found: dict[str, type[BaseModel]] = {}

    def visit(annotation: Any) -> None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_model and annotation.__name__ not in found:
            found[annotation.__name__] = annotation
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for argument in getattr(annotation, "__args__", ()):
            visit(argument)

    visit(root)
    return found


def _fill_in_defaults(definitions: dict[str, Schema], models: dict[str, type[BaseModel]]) -> None:
    """Add defaults that a factory makes: {} for a model, so that the API server fills in what is nested."""
    for name, model in models.items():
        for field_name, field in model.model_fields.items():
            if field.default_factory is None:
                continue
            value = field.get_default(call_default_factory=True)
            alias = field.alias or field_name
            if isinstance(value, BaseModel):
                definitions[name]["properties"][alias]["default"] = {}
            elif value:
                definitions[name]["properties"][alias]["default"] = value


def _add_validations(root: Schema) -> None:
    """Hang each CEL rule on the part of the schema it judges."""
    for path, rules in VALIDATIONS.items():
        node = root
        for step in path.split(".") if path else ():
            node = node["items"] if step == "*" else node["properties"][step]
        node["x-kubernetes-validations"] = [rule.to_schema() for rule in rules]


def open_api_schema() -> Schema:
    """The structural schema of the whole resource."""
    generated = ModelCache.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = generated["$defs"]
    models = _models(ModelCache)
    definitions["ModelCache"] = {key: value for key, value in generated.items() if key != "$defs"}
    _fill_in_defaults(definitions, models)
    root = structural(definitions["ModelCache"], definitions)
    for name in ("apiVersion", "kind"):
        root["properties"][name] = {"type": "string", "description": root["properties"][name]["description"]}
    root["properties"]["metadata"] = {"type": "object"}
    root["required"] = ["spec"]
    _add_validations(root)
    return root


def custom_resource_definition() -> Schema:
    """The whole CustomResourceDefinition object."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": open_api_schema()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.server.replicas",
                "statusReplicasPath": ".status.server.replicas",
                "labelSelectorPath": ".status.server.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": type_, "jsonPath": path, "description": text} for name, type_, path, text in _COLUMNS
        ],
        "selectableFields": [{"jsonPath": ".spec.repoId"}],
    }
    names = {
        "kind": "ModelCache",
        "listKind": "ModelCacheList",
        "plural": PLURAL,
        "singular": "modelcache",
        "shortNames": ["mc"],
        "categories": ["all", "models"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


class _Dumper(yaml.SafeDumper):
    """Writes equal parts out each time: not every reader of CRDs knows YAML's anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class's signature
        return True


def render() -> str:
    """The YAML file's text."""
    body = yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return _HEADER + body


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or with --check only say whether it is what the models say."""
    parser = argparse.ArgumentParser(prog="python -m modelcache_api.crd", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the file is not up to date; write nothing")
    parser.add_argument(
        "path", type=Path, nargs="*", default=[DEFAULT_PATH], help="files to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    text = render()
    stale = [path for path in options.path if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check:
        for path in stale:
            sys.stderr.write(f"{path} is not what the models say; run `python -m modelcache_api.crd {path}`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
