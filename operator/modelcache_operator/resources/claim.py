"""The PersistentVolumeClaim that holds the snapshots, and how large it has to be."""

from modelcache_api.quantities import parse_bytes
from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object

MIB = 2**20
GIB = 2**30


def needed_bytes(spec: ModelCacheSpec, *, active: int, incoming: int) -> int:
    """How large the claim has to be.

    Args:
        spec: spec.storage.size is what the user decided, if given.
        active: Bytes of the snapshot that is served and stays until the new one is.
        incoming: Bytes of the snapshot that is about to be fetched; 0: none.

    Returns:
        Bytes; whole GiB unless spec.storage.size says something else.
    """
    if spec.storage.size:
        return parse_bytes(spec.storage.size)
    computed = (active + incoming) * 11 // 10 + 64 * MIB
    return max(GIB, -(-computed // GIB) * GIB)


def request_of(claim: Object) -> int:
    """Bytes that a live claim asks for."""
    return parse_bytes(claim["spec"]["resources"]["requests"]["storage"])


def capacity_of(claim: Object) -> int | None:
    """Bytes that a live claim has; None while it is not bound."""
    storage = ((claim.get("status") or {}).get("capacity") or {}).get("storage")
    return parse_bytes(storage) if storage else None


def many_nodes(spec: ModelCacheSpec, claim: Object | None) -> bool:
    """Whether pods of several nodes can mount the claim: what is, rather than what was asked."""
    modes = claim["spec"].get("accessModes", []) if claim is not None else spec.storage.access_modes
    return "ReadWriteMany" in modes


def build(cr: Object, spec: ModelCacheSpec, *, size: int, live: Object | None, grown_at: str) -> Object:
    """The claim as it should be.

    Args:
        cr: The ModelCache.
        spec: The effective spec.
        size: Bytes to ask for; never less than what the live claim asks for.
        live: The claim as it is; what cannot be changed is taken from it.
        grown_at: RFC 3339 time of the last growth, or "".
    """
    owned = spec.storage.reclaim_policy == "Delete"
    annotations = {names.GROWN_AT_ANNOTATION: grown_at} if grown_at else {}
    storage_class = spec.storage.storage_class_name
    modes: list[str] = list(spec.storage.access_modes)
    if live is not None:
        storage_class = live["spec"].get("storageClassName")
        modes = list(live["spec"]["accessModes"])
    claim_spec: Object = {"accessModes": modes, "resources": {"requests": {"storage": _quantity(size)}}}
    if storage_class is not None:
        claim_spec["storageClassName"] = storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": names.metadata(
            cr, names.weights_name(cr["metadata"]["name"]), names.VOLUME, owned=owned, annotations=annotations
        ),
        "spec": claim_spec,
    }


def _quantity(size: int) -> str:
    """Bytes in the largest binary unit that says them exactly, as the API server writes quantities."""
    for unit, factor in (("Ti", 2**40), ("Gi", GIB), ("Mi", MIB), ("Ki", 1024)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
