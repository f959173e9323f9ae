"""kopf's part: the watch of ModelCaches that wakes the queue. Its other handlers write finalizers and annotations.

The watch carries metadata only: that something changed is all it has to tell, as reconcile reads live. What a
ModelCache owns is watched in `children`.
"""

from collections.abc import Mapping
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from modelcache_operator.kube import MODEL_CACHES, session
from modelcache_operator.news import News
from modelcache_operator.workqueue import WorkQueue

LISTED_AT_ONCE = 100
"""Objects per page of the first list: they are whole, and a thousand of them are many megabytes."""


class _NoEssence(kopf.DiffBaseStorage):
    """Keeps nothing to compare with: only handlers of changes need it, and kopf copies each object for it."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:  # noqa: ARG002 - kopf's
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002 - kopf's
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        raise NotImplementedError("nothing of ours is stored in a ModelCache")


def registry(queue: WorkQueue[tuple[str, str]], news: News, configuration: Configuration) -> kopf.OperatorRegistry:
    """The handler that adds ModelCaches to the queue."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.AiohttpSession:
        watching = session(configuration, connections=0, metadata_only=True)
        return kopf.AiohttpSession(server=configuration.host, aiohttp_session=watching)

    @kopf.on.event("modelcache.io", "v1alpha1", "modelcaches", registry=handlers)
    async def model_cache_changed(*, namespace: str | None, name: str, event: Mapping[str, Any], **_: Any) -> None:
        key = (namespace or "", name)
        await queue.until_done(key)  # what is being read now is known only then
        metadata = event["object"]["metadata"]
        version, deleted = str(metadata.get("resourceVersion")), event["type"] == "DELETED"
        if news.is_news(key, MODEL_CACHES.kind, str(metadata.get("uid")), version, deleted=deleted):
            queue.add(key)

    return handlers


def operator_settings() -> kopf.OperatorSettings:
    """Kopf as a pure watcher that outlives restarts of the API server."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = _NoEssence()
    settings.watching.chunk_size = LISTED_AT_ONCE
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.queueing.idle_timeout = 1
    # the default gives up after a minute of errors
    settings.networking.error_backoffs = (0.5, 1, 2, 4, *([8] * 1000))
    return settings
