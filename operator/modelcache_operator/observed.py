"""What reconcile is given: everything that was read, and who owns it. Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.clock import parse_time
from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object
from modelcache_operator.resources.server import TokenKeys

Slot = Literal["plan", "fetch", "rollout"]


@dataclass(frozen=True)
class Refusal:
    """The API server would not take an object.

    Attributes:
        status: HTTP status.
        message: Its own words.
    """

    status: int
    message: str

    @property
    def reason(self) -> str:
        """As a condition's reason."""
        if self.status == 403:
            return "QuotaExceeded" if "exceeded quota" in self.message else "Forbidden"
        return "Refused"


@dataclass(frozen=True)
class Observed:
    """One ModelCache and all around it, as read.

    Attributes:
        cr: The ModelCache, raw.
        spec: The effective spec (chart's defaults filled in).
        now: Seconds since the epoch.
        claim: The claim by name, ours or not.
        deployment: The Deployment by name, ours or not.
        services: Services by name, ours or not.
        key_set: The ConfigMap by name, ours or not.
        jobs: Jobs with our labels.
        pods: Pods with our labels; empty when nothing is in motion.
        pods_were_read: Whether something is in motion, so that pods were looked at.
        warnings: Messages of Events by the uid of the object that is stuck.
        slots: Which budgets were asked, and whether there is room.
        refusals: What the API server would not take a moment ago, by (kind, name).
        keys: For access mode Token.
        progress: What the fetch pod answered.
        announced: Digests that the ready servers of before the last fetch announce, `asking.NO_ANSWER` for who is too
            slow; None: not asked, or nobody there.
    """

    cr: Object
    spec: ModelCacheSpec
    now: float
    claim: Object | None = None
    deployment: Object | None = None
    services: Mapping[str, Object] = field(default_factory=dict)
    key_set: Object | None = None
    jobs: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    pods_were_read: bool = False
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    slots: Mapping[Slot, bool] = field(default_factory=dict)
    refusals: Mapping[tuple[str, str], Refusal] = field(default_factory=dict)
    keys: TokenKeys | None = None
    progress: Mapping[str, Any] | None = None
    announced: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """metadata.name."""
        return str(self.cr["metadata"]["name"])

    @property
    def uid(self) -> str:
        """metadata.uid."""
        return str(self.cr["metadata"]["uid"])

    @property
    def generation(self) -> int:
        """metadata.generation: grows with each change of spec."""
        return int(self.cr["metadata"].get("generation") or 0)

    @property
    def status(self) -> Mapping[str, Any]:
        """The status that was written last."""
        return self.cr.get("status") or {}

    @property
    def objects(self) -> list[Object]:
        """The ModelCache and all that was found around it."""
        single = (self.claim, self.deployment, self.key_set)
        found = [child for child in single if child is not None]
        return [self.cr, *found, *self.services.values(), *self.jobs, *self.pods]

    @property
    def reconcile_at(self) -> str:
        """The annotation with which a user asks for a new look."""
        return str((self.cr["metadata"].get("annotations") or {}).get(names.RECONCILE_AT, ""))[:1024]

    def condition(self, type_: str) -> Mapping[str, Any]:
        """A condition that was written last."""
        return next((c for c in self.status.get("conditions") or [] if c.get("type") == type_), {})

    @property
    def fetched_at(self) -> float:
        """When what the spec asks for was found fetched, in seconds since the epoch; now, if that is to be written."""
        fetched = self.condition("Fetched")
        return parse_time(fetched.get("lastTransitionTime")) if fetched.get("status") == "True" else self.now

    def owns(self, child: Object) -> bool:
        """Whether a child was made for this very ModelCache."""
        return any(r.get("uid") == self.uid for r in child["metadata"].get("ownerReferences") or [])

    def may_adopt(self, claim: Object) -> bool:
        """Whether a claim without owner is one that a ModelCache of this name left (reclaimPolicy Retain)."""
        labels = claim["metadata"].get("labels") or {}
        return (
            not claim["metadata"].get("ownerReferences")
            and labels.get(names.NAME_LABEL) == self.name
            and labels.get(names.COMPONENT_LABEL) == names.VOLUME
        )

    def is_ours(self, child: Object) -> bool:
        """Whether we may apply to a child."""
        return self.owns(child) or (child["kind"] == "PersistentVolumeClaim" and self.may_adopt(child))

    def leftover(self, child: Object) -> bool:
        """Whether a child belongs to an earlier ModelCache of the same name, and the garbage collector takes it."""
        references = child["metadata"].get("ownerReferences") or []
        return any(
            r.get("kind") == "ModelCache" and r.get("name") == self.name and r.get("uid") != self.uid
            for r in references
        )


def conflict_text(what: str) -> str:
    """The message of the reason NameConflict."""
    return f"{what} exists and is not ours; it is not touched. Delete it, or choose another name for this ModelCache."


def is_deleting(obj: Object) -> bool:
    """Whether an object's deletion was asked for."""
    return bool(obj["metadata"].get("deletionTimestamp"))
