"""Watches of what ModelCaches own: one stream of metadata for each kind, from now on, without a first list.

A restart needs no list of children, as each ModelCache is read with all around it once the streams have their place.
kopf's handlers would: it lists each kind whole, copies each object several times and gives it a task of its own, which
for a thousand ModelCaches takes longer than reconciling them.
"""

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import aclosing

from modelcache_operator.errors import ApiError, ApiUnreachable
from modelcache_operator.kube import CLAIMS, CONFIG_MAPS, DEPLOYMENTS, JOBS, PODS, SERVICES, Kube, Object, Resource
from modelcache_operator.news import News
from modelcache_operator.resources.names import NAME_LABEL
from modelcache_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

KINDS = (JOBS, DEPLOYMENTS, CLAIMS, SERVICES, CONFIG_MAPS, PODS)
EVENT_DELAY_SECONDS = 0.05
"""Events of children come in bursts: one reconcile answers them all."""
LONGEST_PAUSE_SECONDS = 8.0
_HTTP_GONE = 410

Key = tuple[str, str]


class Children:
    """Wakes the queue when a child changes, chosen by our label by the server.

    Attributes:
        placed: Set when every stream has its place: what is read from then on is never out of date unnoticed.
    """

    def __init__(self, kube: Kube, queue: WorkQueue[Key], news: News, namespaces: Sequence[str]) -> None:
        self.placed = asyncio.Event()
        self._kube = kube
        self._queue = queue
        self._news = news
        self._unplaced = {(resource, namespace) for resource in KINDS for namespace in namespaces or (None,)}

    async def follow(self) -> None:
        """Follow all streams until cancelled, through restarts of the API server."""
        async with asyncio.TaskGroup() as streams:
            for resource, namespace in list(self._unplaced):
                streams.create_task(self._follow(streams, resource, namespace))

    async def _follow(self, streams: asyncio.TaskGroup, resource: Resource, namespace: str | None) -> None:
        since = ""
        failures = 0
        while True:
            at_least = 0.0
            try:
                since = since or await self._place(resource, namespace)
                events = self._kube.watch(resource, namespace, labels=NAME_LABEL, since=since)
                async with aclosing(events):
                    async for event in events:
                        failures = 0
                        metadata = event["object"]["metadata"]
                        since = metadata["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            self._hear(streams, resource, metadata, deleted=event["type"] == "DELETED")
            except (ApiError, ApiUnreachable) as error:
                failures += 1
                if isinstance(error, ApiError):
                    at_least = error.retry_after
                    if error.status == _HTTP_GONE:  # events were missed
                        since = ""
                log.warning("the watch of %s goes on in a moment: %s", resource.plural, error)
            pause = min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** min(failures, 10)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            await asyncio.sleep(max(pause, at_least))

    async def _place(self, resource: Resource, namespace: str | None) -> str:
        """Where to watch from; wakes those of whom something has changed since they were read."""
        if (resource, namespace) in self._unplaced:
            version = await self._kube.version(resource, namespace)
            self._unplaced.discard((resource, namespace))
            if not self._unplaced:
                self.placed.set()
            return version
        children, version = await self._kube.list_metadata(resource, namespace, labels=NAME_LABEL)
        found: dict[Key, dict[str, str]] = defaultdict(dict)
        for child in children:
            metadata = child["metadata"]
            found[_key(metadata)][metadata["uid"]] = metadata["resourceVersion"]
        self._queue.again()  # what is being read now is in doubt
        for key in self._news.changed(resource.kind, namespace, found):
            self._queue.add(key)
        return version

    def _hear(self, streams: asyncio.TaskGroup, resource: Resource, metadata: Object, *, deleted: bool) -> None:
        key = _key(metadata)
        if self._queue.is_active(key):  # what is being read now is known only then
            streams.create_task(self._hear_later(key, resource, metadata, deleted=deleted))
        else:
            self._wake(key, resource, metadata, deleted=deleted)

    async def _hear_later(self, key: Key, resource: Resource, metadata: Object, *, deleted: bool) -> None:
        await self._queue.until_done(key)
        self._wake(key, resource, metadata, deleted=deleted)

    def _wake(self, key: Key, resource: Resource, metadata: Object, *, deleted: bool) -> None:
        uid, version = metadata["uid"], metadata["resourceVersion"]
        if self._news.is_news(key, resource.kind, uid, version, deleted=deleted):
            self._queue.add_after(key, EVENT_DELAY_SECONDS)


def _key(metadata: Object) -> Key:
    return metadata["namespace"], metadata["labels"][NAME_LABEL]
