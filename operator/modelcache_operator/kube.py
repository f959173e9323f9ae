"""A raw Kubernetes client: dictionaries in and out, server-side apply, a bounded pool, deadlines, a call counter.

kubernetes.aio brings configuration, TLS and token rotation. Its models drop fields that they do not know, and its calls
cost six times what aiohttp's do, which a thousand ModelCaches would feel: neither is used.
"""

import json
import random
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from modelcache_operator.errors import ApiError, ApiUnreachable

FIELD_MANAGER = "modelcache-operator"
PAGE = 500
"""Objects per page of a list."""
WATCH_SECONDS = 300.0
"""How long a watch lasts at least before it is asked for anew; not all of them at once."""
WATCH_SILENCE_SECONDS = 90.0
"""A bookmark comes each minute; without one, the connection is dead."""
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_LIST_OF_METADATA = _METADATA_ONLY.replace("Metadata;", "MetadataList;")

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """Where a kind lives in the API."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """The URL path of the collection or of one object; without a namespace, of all namespaces."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        return f"{root}{scope}/{self.plural}" + (f"/{name}" if name else "")


MODEL_CACHES = Resource("modelcache.io/v1alpha1", "ModelCache", "modelcaches")
JOBS = Resource("batch/v1", "Job", "jobs")
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
SERVICES = Resource("v1", "Service", "services")
CLAIMS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
PODS = Resource("v1", "Pod", "pods")
EVENTS = Resource("v1", "Event", "events")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
RESOURCES = {r.kind: r for r in (MODEL_CACHES, JOBS, DEPLOYMENTS, SERVICES, CLAIMS, CONFIG_MAPS, PODS, EVENTS, LEASES)}


async def load_configuration() -> Configuration:
    """Configuration from the pod's service account, or from KUBECONFIG outside a cluster."""
    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    return configuration


def session(
    configuration: Configuration, *, connections: int, timeout: float | None = None, metadata_only: bool = False
) -> aiohttp.ClientSession:
    """A session whose requests are trusted and authenticated as the configuration says.

    Args:
        configuration: From `load_configuration`.
        connections: At most so many; 0: any number.
        timeout: Seconds for a whole request.
        metadata_only: Whether watches bring nothing but metadata, which is a tenth of the bytes. (Lists bring all:
            an empty list of metadata has null for items, which kopf does not expect.)
    """

    async def authenticate(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        # asked each time, as a projected token is rotated
        if (token := await configuration.get_api_key_with_prefix("BearerToken", "authorization")) is not None:
            request.headers["Authorization"] = token
        if metadata_only and "watch" in request.url.query:
            request.headers["Accept"] = _METADATA_ONLY
        return await send(request)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, ssl=RESTClientObject(configuration).ssl_context),
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=10.0),
        proxy=configuration.proxy,
        middlewares=[authenticate],
    )


class Kube:
    """The calls the operator makes; one instance per process, closed at the end.

    Attributes:
        calls: How often each (verb, plural) was called; what the tests and metrics read.
    """

    def __init__(self, configuration: Configuration, *, connections: int = 16, timeout: float = 30.0) -> None:
        self._host = configuration.host
        self._session = session(configuration, connections=connections, timeout=timeout)
        self.calls: Counter[tuple[str, str]] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """Read one object; None if it does not exist."""
        try:
            return await self._call("get", resource.plural, "GET", resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self, resource: Resource, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """List objects, consistently, in pages; kind and apiVersion are filled in (lists leave them out)."""
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = labels
        if fields:
            query["fieldSelector"] = fields
        found: list[Object] = []
        while True:
            page = await self._call("list", resource.plural, "GET", resource.path(namespace), query)
            for item in page.get("items") or []:
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind)
                found.append(item)
            if not (token := (page.get("metadata") or {}).get("continue")):
                return found
            query["continue"] = token

    async def version(self, resource: Resource, namespace: str | None) -> str:
        """From where a watch tells all that happens from now on; raises what a list would, without reading it."""
        path, query = resource.path(namespace), {"limit": "1"}
        return _version(await self._call("list", resource.plural, "GET", path, query, accept=_LIST_OF_METADATA))

    async def list_metadata(
        self, resource: Resource, namespace: str | None, *, labels: str
    ) -> tuple[Sequence[Object], str]:
        """List nothing but metadata, in pages, and from where a watch goes on."""
        query = {"limit": str(PAGE), "labelSelector": labels}
        found: list[Object] = []
        while True:
            path = resource.path(namespace)
            page = await self._call("list", resource.plural, "GET", path, query, accept=_LIST_OF_METADATA)
            found += page.get("items") or []
            if not (token := page["metadata"].get("continue")):
                return found, _version(page)
            query["continue"] = token

    async def watch(
        self, resource: Resource, namespace: str | None, *, labels: str, since: str
    ) -> AsyncGenerator[Object]:
        """Events since a version, of metadata only, bookmarks among them, until the server ends the stream.

        Raises:
            ApiError: 410: the server no longer knows what happened since then.
            ApiUnreachable: No connection, or not even a bookmark for a while.
        """
        self.calls["watch", resource.plural] += 1
        path = resource.path(namespace)
        query = {"watch": "true", "allowWatchBookmarks": "true", "labelSelector": labels, "resourceVersion": since}
        query["timeoutSeconds"] = str(int(WATCH_SECONDS * random.uniform(1, 2)))  # noqa: S311 - jitter
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=WATCH_SILENCE_SECONDS)
        try:
            async with self._session.get(
                f"{self._host}{path}",
                params=query,
                headers={"Accept": _METADATA_ONLY},
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if response.status >= 400:
                    raise ApiError.from_response(
                        response.status, await response.read(), response.headers, f"watch {path}"
                    )
                rest = b""
                async for data in response.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        event: Object = json.loads(line)
                        if event["type"] == "ERROR":
                            status = json.dumps(event["object"]).encode()
                            raise ApiError.from_response(event["object"]["code"], status, {}, f"watch {path}")
                        yield event
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _unreachable(f"watch {path}", error) from error

    async def create(self, obj: Object) -> Object:
        """Create an object; 409 AlreadyExists if the name is taken (an apply would adopt a stranger's)."""
        resource = RESOURCES[obj["kind"]]
        path = resource.path(obj["metadata"]["namespace"])
        return await self._call("create", resource.plural, "POST", path, {"fieldManager": FIELD_MANAGER}, obj)

    async def update(self, obj: Object) -> Object:
        """Replace an object; 409 Conflict unless its resourceVersion is the current one."""
        resource = RESOURCES[obj["kind"]]
        path = resource.path(obj["metadata"]["namespace"], obj["metadata"]["name"])
        return await self._call("update", resource.plural, "PUT", path, {"fieldManager": FIELD_MANAGER}, obj)

    async def apply(self, obj: Object, *, subresource: str = "") -> Object:
        """Server-side apply; creates the object if it is not there (a subresource: 404).

        A resourceVersion in the metadata makes a stale apply fail with 409; a uid alone is not checked for status.
        """
        resource = RESOURCES[obj["kind"]]
        path = resource.path(obj["metadata"]["namespace"], obj["metadata"]["name"])
        verb = "apply"
        if subresource:
            path, verb = f"{path}/{subresource}", f"apply-{subresource}"
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._call(verb, resource.plural, "PATCH", path, query, obj, "application/apply-patch+yaml")

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> bool:
        """Delete exactly the object with this uid, its dependants in the background.

        Returns:
            False if it was gone already, or if another object has taken the name.
        """
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._call("delete", resource.plural, "DELETE", resource.path(namespace, name), {}, options)
        except ApiError as error:
            if error.status in {404, 409}:
                return False
            raise
        return True

    async def review(self, attributes: Object) -> bool:
        """Ask whether this account may do something (SelfSubjectAccessReview)."""
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = await self._call("create", "selfsubjectaccessreviews", "POST", path, {}, body)
        return bool(answer["status"].get("allowed"))

    async def read_path(self, path: str) -> Object:
        """GET a non-resource path such as ``/openid/v1/jwks``."""
        return await self._call("get", path, "GET", path, accept="*/*")

    async def _call(
        self,
        verb: str,
        what: str,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        self.calls[verb, what] += 1
        headers = {"Accept": accept, "Content-Type": content_type}
        try:
            async with self._session.request(
                method,
                f"{self._host}{path}",
                params=query,
                headers=headers,
                data=None if body is None else json.dumps(body).encode(),
                allow_redirects=False,
            ) as response:
                raw = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _unreachable(f"{method} {path}", error) from error
        if response.status >= 400:
            raise ApiError.from_response(response.status, raw, response.headers, f"{method} {path}")
        decoded: Object = json.loads(raw)
        return decoded


def _version(page: Object) -> str:
    return str(page["metadata"]["resourceVersion"])


def _unreachable(request: str, error: Exception) -> ApiUnreachable:
    return ApiUnreachable(f"{request}: the API server does not answer ({type(error).__name__}: {error})")
