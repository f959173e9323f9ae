"""Which events of a watch say something that no reconcile has read yet.

A restart lists everything, and each listed object is an event; so is each answer to our own writes. What a reconcile
has read in this very version is no news. What it wrote is: whoever wrote looks again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from modelcache_operator.kube import Object

Key = tuple[str, str]


@dataclass
class _Read:
    """Versions by uid of what the last reconcile of a key read; pods only where it had to look at them."""

    versions: dict[str, str] = field(default_factory=dict)
    with_pods: bool = False


class News:
    """Remembers what reconciles read, for as long as the ModelCache is there."""

    def __init__(self) -> None:
        self._read: dict[Key, _Read] = {}

    def read(self, key: Key, objects: Iterable[Object], *, with_pods: bool) -> None:
        """A reconcile read these objects, and nothing else of this key."""
        versions = {o["metadata"]["uid"]: str(o["metadata"].get("resourceVersion", "")) for o in objects}
        self._read[key] = _Read(versions, with_pods)

    def forget(self, key: Key) -> None:
        """The ModelCache is gone, or what was read of it is in doubt."""
        self._read.pop(key, None)

    def is_news(self, key: Key, plural: str, uid: str, version: str, *, deleted: bool) -> bool:
        """Whether a reconcile could find something that the last one did not.

        Pods are news only to who looked at them: whatever else happens to a pod shows in its Job or Deployment.
        """
        known = self._read.get(key)
        if known is None:
            return True
        if plural == "pods" and not known.with_pods:
            return False
        return deleted or known.versions.get(uid) != version
