"""What reconcile wants done: plain data that the stages collect and the controller carries out."""

from dataclasses import dataclass, field

from modelcache_operator.comparison import covers
from modelcache_operator.observed import Slot, is_deleting
from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object


@dataclass(frozen=True)
class Note:
    """An Event to tell the user about something that no condition says.

    Attributes:
        reason: CamelCase.
        message: A sentence.
        warning: Whether it is about trouble.
    """

    reason: str
    message: str
    warning: bool = False


@dataclass
class Actions:
    """Collected by the stages, in the order in which they are to be done.

    Attributes:
        creates: Jobs to create.
        applies: Objects to apply.
        deletes: Live objects to delete, exactly these (by uid).
        asks: Budgets whose answer reconcile wants before it can go on.
        notes: Events beside those of the conditions.
        awaited: Names of running Jobs that a stage waits for; others are stopped.
        requeue_after: Seconds until the next look; None: only when something changes.
    """

    creates: list[Object] = field(default_factory=list)
    applies: list[Object] = field(default_factory=list)
    deletes: list[Object] = field(default_factory=list)
    asks: set[Slot] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)
    requeue_after: float | None = None

    def look_again(self, seconds: float) -> None:
        """Reconcile again in so many seconds at the latest."""
        seconds = max(seconds, 0.5)
        self.requeue_after = seconds if self.requeue_after is None else min(self.requeue_after, seconds)

    def ensure(self, wanted: Object, live: Object | None) -> None:
        """Apply an object unless it is there as wished; one that is being deleted is left to go first."""
        marked = marked_object(wanted)
        if live is not None and is_deleting(live):
            self.look_again(2)
        elif live is None or is_changed(live, marked):
            self.applies.append(marked)

    def remove(self, live: Object | None) -> None:
        """Delete an object unless it is gone or going."""
        if live is not None and not is_deleting(live):
            self.deletes.append(live)


def marked_object(wanted: Object) -> Object:
    """The object with the hash of our wish in it, by which a later process knows that it need not apply."""
    metadata = wanted["metadata"]
    annotations = {**metadata.get("annotations", {}), names.APPLIED_ANNOTATION: names.content_hash(wanted)}
    return {**wanted, "metadata": {**metadata, "annotations": annotations}}


def is_changed(live: Object, marked: Object) -> bool:
    """Whether our wish has changed since it was applied, or somebody changed the object since."""
    old = (live["metadata"].get("annotations") or {}).get(names.APPLIED_ANNOTATION)
    return old != marked["metadata"]["annotations"][names.APPLIED_ANNOTATION] or not covers(live, marked)
