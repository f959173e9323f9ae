"""Which events of a watch say something that no reconcile has read yet.

A restart lists all ModelCaches, and each of them is an event; so is each answer to our own writes. What a reconcile has
read in this very version is no news. What it wrote is: whoever wrote looks again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modelcache_operator.kube import PODS, Object

Key = tuple[str, str]


@dataclass
class _Read:
    """Versions by kind and uid of what the last reconcile of a key read; pods only where it had to look at them."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    with_pods: bool = False


class News:
    """Remembers what reconciles read, for as long as the ModelCache is there."""

    def __init__(self) -> None:
        self._read: dict[Key, _Read] = {}

    def read(self, key: Key, objects: Iterable[Object], *, with_pods: bool) -> None:
        """A reconcile read these objects, and nothing else of this key."""
        versions: dict[str, dict[str, str]] = {}
        for obj in objects:
            metadata = obj["metadata"]
            versions.setdefault(obj["kind"], {})[metadata["uid"]] = str(metadata.get("resourceVersion", ""))
        self._read[key] = _Read(versions, with_pods)

    def forget(self, key: Key) -> None:
        """The ModelCache is gone, or what was read of it is in doubt."""
        self._read.pop(key, None)

    def is_news(self, key: Key, kind: str, uid: str, version: str, *, deleted: bool) -> bool:
        """Whether a reconcile could find something that the last one did not.

        Pods are news only to who looked at them: whatever else happens to a pod shows in its Job or Deployment.
        """
        known = self._read.get(key)
        if known is None:
            return True
        if kind == PODS.kind and not known.with_pods:
            return False
        return deleted or known.versions.get(kind, {}).get(uid) != version

    def changed(self, kind: str, namespace: str | None, found: Mapping[Key, Mapping[str, str]]) -> Iterator[Key]:
        """Of whom something of a kind came, went or changed since it was read.

        Args:
            kind: Of the children.
            namespace: Where they were listed; None: everywhere.
            found: Their versions by uid, as they are now. Who has read a stranger's object, which is in no list of
                ours, looks again in vain.
        """
        for key, known in self._read.items():
            is_listed = namespace is None or key[0] == namespace
            is_seen = kind != PODS.kind or known.with_pods
            if is_listed and is_seen and known.versions.get(kind, {}) != found.get(key, {}):
                yield key
