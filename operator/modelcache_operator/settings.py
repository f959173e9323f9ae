"""What the operator is told by its chart: the only module that reads the environment and the defaults file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from modelcache_api.kubernetes import EnvironmentVariable, NamedReference, Resources, Toleration
from modelcache_api.resource import CaBundle
from modelcache_operator.errors import OperatorError


class SettingsError(OperatorError):
    """The environment or the defaults file cannot be understood."""


class Defaults(BaseModel):
    """What applies to every ModelCache that does not say otherwise; the chart's ``defaults:``."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True, extra="forbid", frozen=True
    )

    endpoint: str | None = None
    """Another Hugging Face hub, such as a mirror; buckets do not use it."""

    storage_class_name: str | None = None
    """StorageClass of volumes; absent: the cluster's default."""

    image_pull_secrets: list[NamedReference] = Field(default_factory=list)
    """Secrets for pulling the image, in each ModelCache's namespace."""

    ca_bundle: CaBundle | None = None
    """ConfigMap with certificate authorities, in each ModelCache's namespace."""

    env: list[EnvironmentVariable] = Field(default_factory=list)
    """Environment of plan and fetch Jobs, such as HTTPS_PROXY and NO_PROXY."""

    fetch_resources: Resources = Field(default_factory=Resources)
    """CPU and memory of plan and fetch Jobs."""

    server_resources: Resources = Field(default_factory=Resources)
    """CPU and memory of weight servers."""

    tolerations: list[Toleration] = Field(default_factory=list)
    """Taints that servers (and with them Jobs) accept."""

    run_as_user: Annotated[int, Field(ge=1)] | None = None
    """User of Jobs and servers; absent (what Helm makes of null): left to the platform, as OpenShift wants it."""

    fs_group: Annotated[int, Field(ge=1)] | None = None
    """Group that owns the volume's files; absent: left to the platform."""


@dataclass(frozen=True)
class Settings:
    """Everything that can be chosen about an operator.

    Attributes:
        image: Image of Jobs and servers.
        image_pull_policy: Of the same.
        namespaces: Watched ones; empty: all.
        operator_namespace: Where the Lease is.
        identity: This process in the Lease; the pod's name.
        lease_name: Name of the Lease; empty: no election (a single process under development).
        workers: Reconciles at once.
        max_plans: Plan Jobs at once in the cluster.
        max_fetches: Fetch Jobs at once in the cluster.
        max_fetches_per_host: Fetch Jobs at once from one source host.
        max_rollouts: Server Deployments that roll at once.
        resync_seconds: How often a healthy ModelCache is looked at all the same, jittered.
        retry_seconds: The least time between two attempts at what failed permanently.
        metrics_port: /metrics, /healthz, /readyz.
        log_level: As logging knows it.
        defaults: For every ModelCache.
    """

    image: str
    image_pull_policy: str = "IfNotPresent"
    namespaces: tuple[str, ...] = ()
    operator_namespace: str = "default"
    identity: str = "modelcache-operator"
    lease_name: str = "modelcache-operator"
    workers: int = 16
    max_plans: int = 20
    max_fetches: int = 10
    max_fetches_per_host: int = 4
    max_rollouts: int = 5
    resync_seconds: float = 600.0
    retry_seconds: float = 300.0
    metrics_port: int = 9091
    log_level: str = "INFO"
    defaults: Defaults = field(default_factory=Defaults)


_PREFIX = "MODELCACHE_"


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read MODELCACHE_* and the defaults file.

    Raises:
        SettingsError: Something is missing or cannot be understood; the message names the variable.
    """
    if not (image := environment.get(_PREFIX + "IMAGE")):
        raise SettingsError("MODELCACHE_IMAGE is not set: it names the image that Jobs and servers run")
    values: dict[str, Any] = {"image": image}
    for name in ("image_pull_policy", "operator_namespace", "identity", "lease_name", "log_level"):
        if (text := environment.get(_PREFIX + name.upper())) is not None:
            values[name] = text
    for name, kind in (
        ("workers", int),
        ("max_plans", int),
        ("max_fetches", int),
        ("max_fetches_per_host", int),
        ("max_rollouts", int),
        ("metrics_port", int),
        ("resync_seconds", float),
        ("retry_seconds", float),
    ):
        if text := environment.get(_PREFIX + name.upper()):
            values[name] = _number(kind, name, text)
    namespaces = environment.get(_PREFIX + "NAMESPACES", "")
    values["namespaces"] = tuple(part.strip() for part in namespaces.split(",") if part.strip())
    if path := environment.get(_PREFIX + "DEFAULTS"):
        values["defaults"] = _defaults(Path(path))
    return Settings(**values)


def _number(kind: type[int | float], name: str, text: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise SettingsError(f"{_PREFIX}{name.upper()}={text!r} is no number") from None
    if value <= 0:
        raise SettingsError(f"{_PREFIX}{name.upper()}={text!r} must be more than 0")
    return value


def _defaults(path: Path) -> Defaults:
    try:
        return Defaults.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"the defaults file {path} cannot be read: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise SettingsError(f"the defaults file {path} is wrong: {problems}") from error
