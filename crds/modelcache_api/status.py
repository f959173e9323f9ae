"""status of a ModelCache: what the operator found and did."""

from typing import Annotated, Literal

from pydantic import Field

from modelcache_api.kubernetes import Part

Text = Annotated[str, Field(max_length=1024)]
Hex = Annotated[str, Field(max_length=64)]


class Condition(Part):
    """One condition, as the Kubernetes API conventions define it."""

    type: Annotated[str, Field(max_length=316)]
    """Resolved, Fetched, Serving, UpToDate or Ready."""

    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""

    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    """One CamelCase word for programs, such as AuthFailed."""

    message: Annotated[str, Field(max_length=32768)] = ""
    """What happened, to which file, and what can be done."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation that the condition was computed from."""

    last_transition_time: Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
    """When status last changed, in RFC 3339."""


class Endpoint(Part):
    """Where clients connect."""

    grpc: Text | None = None
    """Address of the gRPC lane, such as dns:///bert-weights.default.svc:9090."""

    http: Text | None = None
    """URL of the HTTP lane, also good as HF_ENDPOINT."""


class VolumeStatus(Part):
    """The volume that holds the snapshots."""

    claim_name: Annotated[str, Field(max_length=253)] | None = None
    """Name of the PersistentVolumeClaim."""


class PreviousRevision(Part):
    """A snapshot that was active before and is kept for instant rollback."""

    requested: Text = ""
    """Branch, tag or commit that was asked for."""

    commit: Hex = ""
    """The commit, or the bucket listing's digest."""

    digest: Hex = ""
    """Digest of the snapshot."""


class RevisionStatus(Part):
    """Which revision was asked for, found and is served."""

    requested: Text | None = None
    """Branch, tag or commit of the spec; empty for buckets."""

    resolved: Hex | None = None
    """The commit that requested stands for, or the bucket listing's digest."""

    active: Hex | None = None
    """The revision that is served."""

    active_requested: Text | None = None
    """Branch, tag or commit by which active was asked for."""

    short: Annotated[str, Field(max_length=12)] | None = None
    """The first 12 characters of active, for `kubectl get`."""

    previous: Annotated[list[PreviousRevision], Field(max_length=100)] = Field(default_factory=list)
    """Revisions kept on the volume, newest first."""


class ServerStatus(Part):
    """The weight servers."""

    replicas: Annotated[int, Field(ge=0)] | None = None
    """Replicas that exist."""

    ready_replicas: Annotated[int, Field(ge=0)] | None = None
    """Replicas that serve."""

    selector: Text | None = None
    """Label selector of the pods, for the scale subresource."""


class ProgressStatus(Part):
    """How far a running fetch has come; written at most each 10 seconds."""

    bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes on the volume."""

    total_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of all files of the plan."""

    bytes_per_second: Annotated[int, Field(ge=0)] | None = None
    """Speed over the last seconds."""

    attempt: Annotated[int, Field(ge=1)] | None = None
    """Which attempt this is, from 1."""

    percent: Annotated[str, Field(max_length=8)] | None = None
    """Bytes of total bytes, such as 42%, for `kubectl get`."""


class PlanRecord(Part):
    """The last look at the source that succeeded: the operator's memory of it, so that a restart plans nothing anew."""

    key: Hex = ""
    """Hash of the source, revision and patterns that were looked up."""

    commit: Hex = ""
    """What the revision stood for."""

    bytes: Annotated[int, Field(ge=0)] = 0
    """Size of all files of the plan."""

    files: Annotated[int, Field(ge=0)] = 0
    """Number of files of the plan."""

    round: Annotated[int, Field(ge=0)] = 0
    """How many plans succeeded so far; part of the next plan Job's name."""

    time: Annotated[str, Field(max_length=64)] = ""
    """When it was looked up, in RFC 3339."""

    reconcile_at: Text = ""
    """The annotation modelcache.io/reconcile-at that this plan answered."""


class FetchRecord(Part):
    """The last fetch that succeeded: what is active on which volume."""

    key: Hex = ""
    """Hash of the source, commit and patterns that were fetched."""

    claim_uid: Annotated[str, Field(max_length=64)] = ""
    """uid of the PersistentVolumeClaim they were fetched to; another one holds nothing yet."""

    round: Annotated[int, Field(ge=0)] = 0
    """How many fetches succeeded so far; part of the next fetch Job's name."""


class ModelCacheStatus(Part):
    """What the operator found and did."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation that this status was computed from."""

    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = Field(default_factory=list)
    """Resolved, Fetched, Serving, UpToDate and Ready."""

    endpoint: Endpoint | None = None
    """Where clients connect."""

    volume: VolumeStatus | None = None
    """The volume that holds the snapshots."""

    revision: RevisionStatus | None = None
    """Which revision was asked for, found and is served."""

    digest: Hex | None = None
    """Digest of the active snapshot: what a client pins."""

    files: Annotated[int, Field(ge=0)] | None = None
    """Number of files in the active snapshot."""

    bytes: Annotated[int, Field(ge=0)] | None = None
    """Size of the active snapshot in bytes."""

    size: Annotated[str, Field(max_length=32)] | None = None
    """bytes as people read it, for `kubectl get`."""

    server: ServerStatus | None = None
    """The weight servers."""

    plan: PlanRecord | None = None
    """The operator's record of the last successful plan."""

    fetch: FetchRecord | None = None
    """The operator's record of the last successful fetch."""

    progress: ProgressStatus | None = None
    """How far a running fetch has come."""
