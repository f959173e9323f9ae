"""A spec with the chart's defaults filled in: what all other builders take."""

from modelcache_api.kubernetes import Resources
from modelcache_api.quantities import parse_bytes
from modelcache_api.resource import ModelCacheSpec, Server
from modelcache_api.rules import MIB, MINIMUM_CACHE_BYTES, SERVER_OVERHEAD_BYTES
from modelcache_api.source import parse_repo_id
from modelcache_operator.settings import Defaults


def effective(spec: ModelCacheSpec, defaults: Defaults) -> ModelCacheSpec:
    """The spec as it is carried out: what it says itself always wins.

    Lists of environment variables are joined by name; everything else is taken whole from one or the other.
    """
    is_hub = parse_repo_id(spec.repo_id).scheme == "hf"
    own_storage = spec.storage.existing_claim is None
    fetch, server, storage = spec.fetch, spec.server, spec.storage
    names = {variable.name for variable in fetch.env}
    many_nodes = storage.many_nodes
    fetch = fetch.model_copy(
        update={
            "env": [*(v for v in defaults.env if v.name not in names), *fetch.env],
            "ca_bundle": fetch.ca_bundle or defaults.ca_bundle,
            "image_pull_secrets": fetch.image_pull_secrets or defaults.image_pull_secrets,
            "resources": fetch.resources if _says(fetch.resources) else defaults.fetch_resources,
            "tolerations": fetch.tolerations or (defaults.tolerations if many_nodes else []),
        }
    )
    server = server.model_copy(
        update={
            "resources": server.resources if _says(server.resources) else _holding(defaults.server_resources, server),
            "tolerations": server.tolerations or defaults.tolerations,
        }
    )
    storage = storage.model_copy(
        update={
            "storage_class_name": storage.storage_class_name or (defaults.storage_class_name if own_storage else None)
        }
    )
    return spec.model_copy(
        update={
            "endpoint": spec.endpoint or (defaults.endpoint if is_hub else None),
            "fetch": fetch,
            "server": server,
            "storage": storage,
        }
    )


def _holding(resources: Resources, server: Server) -> Resources:
    """The chart's resources, of which the memory limit holds the cache that this ModelCache asks for."""
    limit = resources.limits.get("memory")
    needed = (server.cache_bytes or MINIMUM_CACHE_BYTES) + SERVER_OVERHEAD_BYTES
    if limit is None or parse_bytes(limit) >= needed:
        return resources
    return resources.model_copy(update={"limits": {**resources.limits, "memory": f"{-(-needed // MIB)}Mi"}})


def _says(resources: object) -> bool:
    return bool(getattr(resources, "limits", None) or getattr(resources, "requests", None))
