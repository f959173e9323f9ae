"""kopf's part: watch streams that wake the queue. Nothing else: its other handlers write finalizers and annotations.

The streams carry metadata only: that something changed is all they have to tell, as reconcile reads live.
"""

from collections.abc import Mapping
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from modelcache_operator.kube import session
from modelcache_operator.news import News
from modelcache_operator.resources.names import NAME_LABEL
from modelcache_operator.workqueue import WorkQueue

CHILDREN = ("jobs", "deployments", "persistentvolumeclaims", "services", "configmaps", "pods")
LISTED_AT_ONCE = 100
"""Objects per page of the first list: they are whole, and a thousand of them are many megabytes."""
CHILD_DELAY_SECONDS = 0.05
"""Events of children come in bursts: one reconcile answers them all."""


def registry(
    queue: WorkQueue[tuple[str, str]], news: News, configuration: Configuration, settings: kopf.OperatorSettings
) -> kopf.OperatorRegistry:
    """Handlers that add keys to the queue; children are watched by our label only, chosen by the server."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.AiohttpSession:
        watching = session(configuration, connections=0, metadata_only=True)
        return kopf.AiohttpSession(server=configuration.host, aiohttp_session=watching)

    async def is_news(key: tuple[str, str], plural: str, event: Mapping[str, Any]) -> bool:
        await queue.until_done(key)  # what is being read now is known only then
        metadata = event["object"]["metadata"]
        version = str(metadata.get("resourceVersion"))
        return news.is_news(key, plural, str(metadata.get("uid")), version, deleted=event["type"] == "DELETED")

    @kopf.on.event("modelcache.io", "v1alpha1", "modelcaches", registry=handlers)
    async def model_cache_changed(*, namespace: str | None, name: str, event: Mapping[str, Any], **_: Any) -> None:
        key = (namespace or "", name)
        if await is_news(key, "modelcaches", event):
            queue.add(key)

    def watch(plural: str) -> None:
        @kopf.on.event(plural, registry=handlers, labels={NAME_LABEL: kopf.PRESENT}, id=f"{plural}_changed")
        async def child_changed(
            *, namespace: str | None, labels: kopf.Labels, event: Mapping[str, Any], **_: Any
        ) -> None:
            key = (namespace or "", labels[NAME_LABEL])
            if await is_news(key, plural, event):
                queue.add_after(key, CHILD_DELAY_SECONDS)

        settings.watching.label_selectors[plural] = NAME_LABEL

    for plural in CHILDREN:
        watch(plural)
    return handlers


def operator_settings() -> kopf.OperatorSettings:
    """Kopf as a pure watcher that outlives restarts of the API server."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.chunk_size = LISTED_AT_ONCE
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.queueing.idle_timeout = 1
    # the default gives up after a minute of errors
    settings.networking.error_backoffs = (0.5, 1, 2, 4, *([8] * 1000))
    return settings
