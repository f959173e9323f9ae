"""The pieces of Kubernetes' own API that a ModelCache spec takes: resources, tolerations, environment, references.

Typed where they are small. Affinity and topology spread constraints stay free objects: Kubernetes checks them when the
Job or Deployment is made.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

from modelcache_api.quantities import parse_duration, parse_quantity


class Part(BaseModel):
    """Base of all models: camelCase in YAML and JSON, snake_case in Python; fields of a newer version are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        extra="ignore",
        strict=True,
        frozen=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        """A field set to null takes its default, as on the API server."""
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _checked_quantity(text: str) -> str:
    parse_quantity(text)
    return text


def _checked_duration(text: str) -> str:
    parse_duration(text)
    return text


Quantity = Annotated[
    str,
    Field(max_length=64),
    BeforeValidator(_number_as_text),
    AfterValidator(_checked_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}),
]
"""A Kubernetes quantity such as 20Gi; a plain number counts bytes (or cores)."""

Duration = Annotated[str, Field(min_length=2, max_length=32), AfterValidator(_checked_duration)]
"""A Go duration such as 10m or 1h30m."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253)]
"""The name of another Kubernetes object."""

Label = Annotated[str, Field(max_length=316)]
"""A label's key, with its optional DNS prefix."""

LabelValue = Annotated[str, Field(max_length=63)]
"""A label's value."""

NodeSelector = Annotated[dict[Label, LabelValue], Field(max_length=32)]
"""Labels that a node must have."""

FreeObject = dict[str, Any]
"""An object that Kubernetes checks itself."""


class NamedReference(Part):
    """The name of an object in the ModelCache's namespace."""

    name: ObjectName
    """Name of the object, in the ModelCache's namespace."""


class Resources(Part):
    """CPU, memory and other resources of a container."""

    limits: Annotated[dict[Label, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """The most it may use, such as {memory: 2Gi}."""

    requests: Annotated[dict[Label, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """What the scheduler reserves for it, such as {cpu: 500m, memory: 1Gi}."""


class Toleration(Part):
    """A taint of nodes that the pods accept."""

    key: Label | None = None
    """Key of the taint; absent with operator Exists: every taint."""

    operator: Literal["Exists", "Equal"] = "Equal"
    """Equal compares the value too, Exists only the key."""

    value: LabelValue | None = None
    """Value of the taint, for operator Equal."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent: every effect."""

    toleration_seconds: int | None = None
    """How many seconds a pod stays on a node with a NoExecute taint; absent: for ever."""


class KeyReference(Part):
    """A key of a Secret in the ModelCache's namespace."""

    name: ObjectName
    """Name of the Secret."""

    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Key inside the Secret."""

    optional: bool = False
    """Whether the pod starts although Secret or key are missing."""


class EnvironmentSource(Part):
    """Where an environment variable's value comes from."""

    secret_key_ref: KeyReference
    """A key of a Secret."""


class EnvironmentVariable(Part):
    """One environment variable: a value, or a Secret's key."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of the variable, such as HTTPS_PROXY."""

    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, in clear text."""

    value_from: EnvironmentSource | None = None
    """A Secret's key as its value, instead of value."""
