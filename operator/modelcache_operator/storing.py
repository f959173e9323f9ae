"""Second stage: the volume. Creates, grows and adopts the claim, and says whether it can be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelcache_api.quantities import format_bytes
from modelcache_operator.actions import Actions, Note
from modelcache_operator.clock import format_time, parse_time
from modelcache_operator.observed import Observed, conflict_text, is_deleting
from modelcache_operator.resources import claim as builder
from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object

GROWTH_SECONDS = 120.0
"""How long a fetch waits for the volume to grow before it tries with what there is."""


@dataclass(frozen=True)
class Stored:
    """The volume as it can be used now.

    Attributes:
        name: Name of the claim.
        claim: The live claim, if it may be used.
        problem: (reason, message) why it may not, or not yet.
        note: What the user should know although it can be used.
        growing: Growth was asked for and is not done.
    """

    name: str
    claim: Object | None
    problem: tuple[str, str] | None = None
    note: str = ""
    growing: bool = False

    @property
    def uid(self) -> str:
        """Uid of the claim; "" if there is none to use."""
        return str(self.claim["metadata"]["uid"]) if self.claim is not None else ""


def active_on(observed: Observed, claim: Object | None) -> bool:
    """Whether a snapshot of ours is active on this very claim, by what status remembers."""
    fetched = observed.status.get("fetch") or {}
    return claim is not None and bool(fetched) and fetched.get("claimUid") == claim["metadata"]["uid"]


def store(observed: Observed, actions: Actions, record: Mapping[str, Any] | None) -> Stored:
    """Bring the claim to what it should be.

    Args:
        observed: What was read.
        actions: Takes what is to be done.
        record: The valid plan, or None while there is none: then a claim is not made, only kept.
    """
    name = names.claim_name(observed.name, observed.spec)
    claim = observed.claim
    if claim is not None and is_deleting(claim):
        return _going(observed, actions, name)
    if observed.spec.storage.existing_claim:
        if claim is None:
            actions.look_again(10)
            return Stored(name, None, ("ClaimNotFound", f"There is no PersistentVolumeClaim {name}; create it."))
        return Stored(name, claim, _lost(observed, claim))
    if claim is None:
        return _create(observed, actions, name, record)
    if observed.is_ours(claim):
        return _keep(observed, actions, name, claim, record)
    return _strange(observed, actions, name, claim)


def _strange(observed: Observed, actions: Actions, name: str, claim: Object) -> Stored:
    """Somebody else's claim has the name that ours needs."""
    if observed.leftover(claim):
        actions.look_again(2)
        text = f"The volume {name} of the ModelCache that had this name before is still going."
        return Stored(name, None, ("VolumeTerminating", text))
    text = conflict_text(f"PersistentVolumeClaim {name}") + " Or use it as spec.storage.existingClaim."
    actions.look_again(60)
    return Stored(name, None, ("NameConflict", text))


def _going(observed: Observed, actions: Actions, name: str) -> Stored:
    anew = "create it again then" if observed.spec.storage.existing_claim else "then it is made anew"
    text = f"PersistentVolumeClaim {name} is being deleted; servers stop so that it can go, {anew}."
    for job in observed.jobs:  # a claim is in use for as long as a pod of it exists, also one that has ended
        if (job["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL) == names.FETCH and observed.owns(job):
            actions.remove(job)
    if observed.condition("Fetched").get("reason") != "VolumeTerminating":
        actions.notes.append(Note("VolumeTerminating", text, warning=True))
    actions.look_again(2)
    return Stored(name, None, ("VolumeTerminating", text))


def _create(observed: Observed, actions: Actions, name: str, record: Mapping[str, Any] | None) -> Stored:
    if record is None:
        return Stored(name, None, ("NotResolved", "The volume is made when the size of the model is known."))
    size = builder.needed_bytes(observed.spec, active=0, incoming=int(record["bytes"]))
    actions.ensure(builder.build(observed.cr, observed.spec, size=size, live=None, grown_at=""), None)
    if (refusal := observed.refusals.get(("PersistentVolumeClaim", name))) is not None:
        return Stored(name, None, (refusal.reason, refusal.message))
    return Stored(name, None, ("CreatingVolume", f"A volume of {format_bytes(size)} is being made."))


def _keep(observed: Observed, actions: Actions, name: str, claim: Object, record: Mapping[str, Any] | None) -> Stored:
    spec = observed.spec
    has = builder.request_of(claim)
    incoming = 0
    if record is not None:
        fetched = observed.status.get("fetch") or {}
        done = active_on(observed, claim) and fetched.get("key") == names.fetch_key(spec, record["commit"])
        incoming = 0 if done else int(record["bytes"])
    active = int(observed.status.get("bytes") or 0) if active_on(observed, claim) else 0
    needed = builder.needed_bytes(spec, active=active, incoming=incoming) if incoming or spec.storage.size else has
    grown_at = (claim["metadata"].get("annotations") or {}).get(names.GROWN_AT_ANNOTATION, "")
    refusal = observed.refusals.get(("PersistentVolumeClaim", name))
    note = ""
    if needed > has and refusal is not None:
        note = f" The volume could not be grown to {format_bytes(needed)}: {refusal.message}"
        needed = has
    elif needed > has:
        grown_at = format_time(observed.now)
    wanted = builder.build(observed.cr, spec, size=max(needed, has), live=claim, grown_at=grown_at)
    actions.ensure(wanted, claim)
    capacity = builder.capacity_of(claim)
    growing = needed > has or (capacity is not None and capacity < has and _still_growing(observed, claim, grown_at))
    return Stored(name, claim, _lost(observed, claim), note=note, growing=growing)


def _still_growing(observed: Observed, claim: Object, grown_at: str) -> bool:
    """Whether to wait: not once only a pod's mount is missing to finish it, and not for ever."""
    conditions = (claim.get("status") or {}).get("conditions") or []
    if any(c.get("type") == "FileSystemResizePending" and c.get("status") == "True" for c in conditions):
        return False
    return observed.now < parse_time(grown_at) + GROWTH_SECONDS


def _lost(observed: Observed, claim: Object) -> tuple[str, str] | None:
    if (claim.get("status") or {}).get("phase") == "Lost":
        name = claim["metadata"]["name"]
        anew = "and create it again" if observed.spec.storage.existing_claim else "then it is made anew"
        return "VolumeLost", f"The PersistentVolume of claim {name} is gone; delete the claim, {anew}."
    return None
