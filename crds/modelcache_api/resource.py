"""The ModelCache resource (modelcache.io/v1alpha1): the one source of its schema, defaults, bounds and documentation.

The CRD is generated from these models; what stands below a field is what `kubectl explain` shows. Rules between fields
are in `rules`.
"""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from modelcache_api.kubernetes import (
    Duration,
    EnvironmentVariable,
    FreeObject,
    Label,
    NamedReference,
    NodeSelector,
    ObjectName,
    Part,
    Quantity,
    Resources,
    Toleration,
)
from modelcache_api.quantities import parse_bytes, parse_duration
from modelcache_api.rules import BLOCK_BYTES, MINIMUM_CACHE_BYTES, broken_rules
from modelcache_api.source import parse_repo_id
from modelcache_api.status import ModelCacheStatus

API_VERSION: Literal["modelcache.io/v1alpha1"] = "modelcache.io/v1alpha1"
KIND: Literal["ModelCache"] = "ModelCache"
MAXIMUM_NAME = 40
"""Longest metadata.name: Services, Jobs and pods add their own endings and have to stay below 63 characters."""
DEFAULT_REVISION = "main"
DEFAULT_AUDIENCE = "modelcache.io"
MINIMUM_REFRESH_SECONDS = 300.0

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_BAD_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/.]|[/.]$|\.lock$")


def _name(value: str) -> str:
    if len(value) > MAXIMUM_NAME:
        raise ValueError(f"{value!r} has {len(value)} characters; use at most {MAXIMUM_NAME}, as Services need it")
    if not _NAME.fullmatch(value):
        suggestion = re.sub(r"^[^a-z]+|-+$", "", re.sub(r"[^a-z0-9]+", "-", value.lower()))[:MAXIMUM_NAME]
        better = f", such as {suggestion!r}" if suggestion else ""
        raise ValueError(
            f"{value!r} is no Service name; use lower-case letters, digits and '-', beginning with a letter{better}"
        )
    return value


def _repo_id(value: str) -> str:
    parse_repo_id(value)
    return value


def _revision(value: str) -> str:
    if _BAD_REVISION.search(value):
        raise ValueError(f"{value!r} is no branch, tag or commit, such as main, v1.0 or a commit's 40 hex digits")
    return value


def _file_pattern(value: str) -> str:
    if not value.strip():
        raise ValueError('a pattern cannot be empty; write one such as "*.safetensors"')
    if value.startswith(("/", "./", "../")):
        raise ValueError(f"{value!r} can match nothing: patterns are on the path inside the repo, such as onnx/*")
    return value


def _endpoint(value: str) -> str:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in value):
        raise ValueError("is no http:// or https:// URL, such as https://hub.example.com")
    if parts.username is not None or parts.password is not None:
        raise ValueError("has credentials in it, which everybody who may read the spec could see; use secretRef")
    if parts.query or parts.fragment:
        raise ValueError("has a query or fragment in it; write the base URL, such as https://hub.example.com")
    return value


def _positive_bytes(value: str) -> str:
    parse_bytes(value)
    return value


def _cache_size(value: str) -> str:
    size = parse_bytes(value)
    if size < MINIMUM_CACHE_BYTES:
        raise ValueError(f"{value} is less than the smallest cache; write at least 64Mi")
    if size % BLOCK_BYTES:
        up = -(-size // BLOCK_BYTES) * 4
        raise ValueError(f"{value} is not a multiple of 4Mi, the size of a cache block; write {up}Mi")
    return value


def _refresh_interval(value: str) -> str:
    if parse_duration(value) < MINIMUM_REFRESH_SECONDS:
        raise ValueError(f"{value} is too short: sources limit how often they are asked; write 5m or more")
    return value


def _positive_duration(value: str) -> str:
    if parse_duration(value) < 1:
        raise ValueError(f"{value} is too short; write 1s or more")
    return value


FilePattern = Annotated[str, Field(max_length=512), AfterValidator(_file_pattern)]


class Refresh(Part):
    """When to look again at a branch or bucket that moves."""

    interval: Annotated[Duration, AfterValidator(_refresh_interval)]
    """Time between two looks, such as 10m; at least 5m, and spread a little so that many do not ask at once."""


class Storage(Part):
    """The volume that keeps the snapshots."""

    size: Annotated[Quantity, AfterValidator(_positive_bytes)] | None = None
    """Size of the volume, such as 20Gi; absent: computed from the plan. A volume only ever grows."""

    storage_class_name: ObjectName | None = None
    """StorageClass of the volume; absent: the chart's default, or else the cluster's."""

    access_modes: Annotated[list[Annotated[str, Field(max_length=32)]], Field(min_length=1, max_length=2)] = Field(
        default_factory=lambda: ["ReadWriteOnce"]
    )
    """ReadWriteOnce: fetches and servers share one node. ReadWriteMany: servers spread over nodes."""

    existing_claim: ObjectName | None = None
    """A PersistentVolumeClaim that exists already and is used instead of a new one; it is never deleted."""

    reclaim_policy: Literal["Delete", "Retain"] = "Delete"
    """What becomes of the volume when the ModelCache is deleted. Retain: the next one of the same name adopts it."""

    @property
    def many_nodes(self) -> bool:
        """Whether pods of several nodes can mount the volume."""
        return "ReadWriteMany" in self.access_modes


class CaBundle(Part):
    """Certificate authorities to trust beside the system's."""

    config_map: ObjectName
    """Name of a ConfigMap in the ModelCache's namespace."""

    key: Annotated[str, Field(min_length=1, max_length=253)] = "ca.crt"
    """Its key with the certificates, in PEM."""


class Fetch(Part):
    """How plan and fetch Jobs run."""

    resources: Resources = Field(default_factory=Resources)
    """CPU and memory of the Jobs; 256Mi fetch a model of any size."""

    node_selector: NodeSelector = Field(default_factory=dict)
    """Labels of the nodes that may run the Jobs; only for ReadWriteMany, else the server's hold."""

    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that the Jobs accept; only for ReadWriteMany, else the server's hold."""

    affinity: FreeObject | None = None
    """Affinity of the Jobs' pods, as in a pod; only for ReadWriteMany, else the server's holds."""

    service_account_name: ObjectName | None = None
    """ServiceAccount of the Jobs, for the cloud's own identity (IRSA, workload identity)."""

    image_pull_secrets: Annotated[list[NamedReference], Field(max_length=16)] = Field(default_factory=list)
    """Secrets for pulling the image."""

    env: Annotated[list[EnvironmentVariable], Field(max_length=64)] = Field(default_factory=list)
    """Environment variables of the Jobs, such as HTTPS_PROXY."""

    ca_bundle: CaBundle | None = None
    """Certificate authorities to trust beside the system's."""

    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Longest time that one Job may take, retries included, in seconds; absent: no limit."""

    stall_timeout: Annotated[Duration, AfterValidator(_positive_duration)] = "5m"
    """A download that gets no byte for so long is begun again where it broke, and fails with Stalled in the end."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 4
    """How many times a failing Job is tried again; permanent failures are not."""

    concurrency: Annotated[int, Field(ge=1, le=64)] = 8
    """How many files or parts of files are downloaded at once."""


class Redis(Part):
    """A second cache tier that the replicas share."""

    secret_ref: NamedReference
    """Secret whose key redis_url holds rediss://user:password@host:6379/0."""

    ttl: Annotated[Duration, AfterValidator(_positive_duration)] = "24h"
    """How long a block stays in Redis."""


class ServiceAccountReference(Part):
    """A ServiceAccount that may read."""

    namespace: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Its namespace; absent: the ModelCache's own."""

    name: ObjectName
    """Its name."""


class Tls(Part):
    """TLS of the weight servers."""

    secret_name: ObjectName
    """Secret with tls.crt and tls.key, as cert-manager makes it; a renewed certificate is taken without a restart."""


class Access(Part):
    """Who may read."""

    mode: Literal["Open", "Token"] = "Open"
    """Open: whoever reaches the Service. Token: pods of the listed ServiceAccounts, with a token for the audience."""

    service_accounts: Annotated[list[ServiceAccountReference], Field(max_length=64)] = Field(default_factory=list)
    """ServiceAccounts that may read in mode Token."""

    audience: Annotated[str, Field(min_length=1, max_length=253)] = DEFAULT_AUDIENCE
    """Audience that a token must be made for."""

    tls: Tls | None = None
    """Encrypts both lanes; absent: plain HTTP and gRPC."""


class Server(Part):
    """The weight servers."""

    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    """Number of servers; 0: none, pods mount the volume."""

    cache_size: Annotated[Quantity, AfterValidator(_cache_size)] | None = None
    """Memory of each server's block cache, a multiple of 4Mi from 64Mi; absent: the model's size, at most 1Gi."""

    redis: Redis | None = None
    """A second cache tier that the replicas share."""

    warmup: bool = True
    """Whether a server fills its cache before it is ready."""

    warmup_size: Annotated[Quantity, AfterValidator(_positive_bytes)] | None = None
    """How much of the model is in the cache before a server is ready, from its first file on; absent: all that fits."""

    resources: Resources = Field(default_factory=Resources)
    """CPU and memory of a server; a memory limit holds cacheSize and at least 256Mi beside it."""

    node_selector: NodeSelector = Field(default_factory=dict)
    """Labels of the nodes that may run servers."""

    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that the servers accept."""

    affinity: FreeObject | None = None
    """Affinity of the servers' pods, as in a pod."""

    topology_spread_constraints: Annotated[list[FreeObject], Field(max_length=8)] = Field(default_factory=list)
    """How replicas spread, as in a pod; only for ReadWriteMany."""

    access: Access = Field(default_factory=Access)
    """Who may read."""

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of cacheSize."""
        return None if self.cache_size is None else parse_bytes(self.cache_size)

    @property
    def warmup_bytes(self) -> int | None:
        """How many bytes are warmed up before a server is ready; None: all that fit."""
        if not self.warmup:
            return 0
        return None if self.warmup_size is None else parse_bytes(self.warmup_size)


class ModelCacheSpec(Part):
    """Which model is kept, where, and how it is served."""

    repo_id: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_repo_id)]
    """Where the model is: org/name or hf://org/name (Hugging Face), s3://bucket/prefix, gs://bucket/prefix."""

    revision: Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_revision)] | None = None
    """Branch, tag or commit of a Hugging Face repo; absent: main."""

    allow_patterns: Annotated[list[FilePattern], Field(max_length=128)] = Field(default_factory=list)
    """Files to take: Unix shell wildcards on the path inside the repo. Absent: one complete set of weights and what belongs to it."""  # noqa: E501 - a docstring of one line becomes one line of kubectl explain

    ignore_patterns: Annotated[list[FilePattern], Field(max_length=128)] = Field(default_factory=list)
    """Files to leave out, also where allowPatterns take them."""

    secret_ref: NamedReference | None = None
    """Secret with hf_access_token, s3_credentials.json or service_account.json; absent: anonymous, or the pod's cloud identity."""  # noqa: E501

    endpoint: Annotated[str, Field(min_length=8, max_length=1024), AfterValidator(_endpoint)] | None = None
    """URL of another hub, S3 or GCS service; absent: the public one."""

    refresh: Refresh | None = None
    """When to look again at a branch or bucket that moves; absent: only when the spec changes."""

    storage: Storage = Field(default_factory=Storage)
    """The volume that keeps the snapshots."""

    fetch: Fetch = Field(default_factory=Fetch)
    """How plan and fetch Jobs run."""

    server: Server = Field(default_factory=Server)
    """The weight servers."""

    revision_history_limit: Annotated[int, Field(ge=0, le=100)] = 1
    """How many older snapshots are kept on the volume, for instant rollback."""

    suspend: bool = False
    """True: nothing is planned or fetched; what is served stays served."""

    @property
    def requested_revision(self) -> str:
        """The branch, tag or commit that is meant: "main" where a hub's is absent, "" for buckets and folders."""
        return (self.revision or DEFAULT_REVISION) if parse_repo_id(self.repo_id).has_revisions else ""

    @model_validator(mode="after")
    def _rules_between_fields(self, info: ValidationInfo) -> Self:
        """Check `rules`; validation context {"cluster": True} adds those that hold only in a cluster."""
        cluster = bool(info.context and info.context.get("cluster"))
        problems = broken_rules(self, cluster=cluster)
        if problems:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("rule", "{sentence}", {"sentence": problem.sentence}),
                        loc=problem.path,
                        input=None,
                    )
                    for problem in problems
                ],
            )
        return self


class Metadata(Part):
    """The part of a Kubernetes object's metadata that this project reads."""

    name: Annotated[str, Field(min_length=1), AfterValidator(_name)]
    """Name of the ModelCache: a DNS-1035 label of at most 40 characters."""

    namespace: Annotated[str, Field(max_length=63)] | None = None
    """Namespace; local mode ignores it."""

    labels: dict[Label, Annotated[str, Field(max_length=63)]] = Field(default_factory=dict)
    """Labels."""

    annotations: dict[Label, str] = Field(default_factory=dict)
    """Annotations."""

    uid: str | None = None
    """Set by the API server."""

    generation: int | None = None
    """Set by the API server: grows with each change of spec."""

    resource_version: str | None = None
    """Set by the API server."""

    creation_timestamp: str | None = None
    """Set by the API server."""

    deletion_timestamp: str | None = None
    """Set by the API server when deletion was asked for."""


class ModelCache(Part):
    """A model's weights, kept in the cluster: fetched once, verified, followed and served."""

    api_version: Literal["modelcache.io/v1alpha1"] = API_VERSION
    """modelcache.io/v1alpha1."""

    kind: Literal["ModelCache"] = KIND
    """ModelCache."""

    metadata: Metadata
    """Name, namespace, labels and annotations."""

    spec: ModelCacheSpec
    """Which model is kept, where, and how it is served."""

    status: ModelCacheStatus | None = None
    """What the operator found and did."""
