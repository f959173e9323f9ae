"""Rules between the fields of a spec, each in one function with the sentence that the user reads.

A field's own bounds stand beside the field in `resource`; here is what only two or more fields decide. Every rule takes
the whole spec and returns the problem or None. The operator's CRD says the same in CEL, rule by rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache_api.quantities import parse_quantity
from modelcache_api.source import parse_repo_id

if TYPE_CHECKING:
    from modelcache_api.resource import ModelCacheSpec

MIB = 2**20
BLOCK_BYTES = 4 * MIB
MINIMUM_CACHE_BYTES = 64 * MIB
SERVER_OVERHEAD_BYTES = 256 * MIB
"""What a weight server needs beside its block cache."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a spec.

    Attributes:
        path: Fields from spec downwards, as YAML spells them.
        sentence: What is wrong and what to write instead.
    """

    path: tuple[str, ...]
    sentence: str


Rule = Callable[["ModelCacheSpec"], Problem | None]


def revision_is_for_hubs(spec: "ModelCacheSpec") -> Problem | None:
    """Buckets and folders have no branches."""
    if spec.revision is None or parse_repo_id(spec.repo_id).has_revisions:
        return None
    return Problem(
        ("revision",),
        "only a Hugging Face repo has revisions; take it away, a bucket or folder is identified by its listing",
    )


def folder_needs_no_account(spec: "ModelCacheSpec") -> Problem | None:
    """A local folder has neither endpoint nor secret."""
    if parse_repo_id(spec.repo_id).scheme != "file":
        return None
    if spec.endpoint is not None:
        return Problem(("endpoint",), "a file:// source has no endpoint; take it away")
    if spec.secret_ref is not None:
        return Problem(("secretRef",), "a file:// source needs no secret; take it away")
    return None


def access_mode_can_be_shared(spec: "ModelCacheSpec") -> Problem | None:
    """Fetch Jobs and servers mount the volume together."""
    for mode in spec.storage.access_modes:
        if mode == "ReadWriteOncePod":
            return Problem(
                ("storage", "accessModes"),
                "ReadWriteOncePod lets only one pod mount the volume, but the fetch and the servers do so together; "
                "write ReadWriteOnce or ReadWriteMany",
            )
        if mode == "ReadOnlyMany":
            return Problem(
                ("storage", "accessModes"), "a fetch writes to the volume; write ReadWriteOnce or ReadWriteMany"
            )
        if mode not in {"ReadWriteOnce", "ReadWriteMany"}:
            return Problem(("storage", "accessModes"), f"{mode!r} is unknown; write ReadWriteOnce or ReadWriteMany")
    return None


def existing_claim_has_its_size(spec: "ModelCacheSpec") -> Problem | None:
    """Size and class belong to claims that the operator makes."""
    if spec.storage.existing_claim is None:
        return None
    for name, value in (("size", spec.storage.size), ("storageClassName", spec.storage.storage_class_name)):
        if value is not None:
            return Problem(("storage", name), f"existingClaim is a volume that exists already; take {name} away")
    return None


def single_node_fetch_follows_server(spec: "ModelCacheSpec") -> Problem | None:
    """A ReadWriteOnce volume is on one node: Jobs take the server's placement."""
    if spec.storage.many_nodes:
        return None
    for name, value in (
        ("nodeSelector", spec.fetch.node_selector),
        ("tolerations", spec.fetch.tolerations),
        ("affinity", spec.fetch.affinity),
    ):
        if value:
            return Problem(
                ("fetch", name),
                f"a ReadWriteOnce volume is on one node, so fetches run where the server does; write server.{name} "
                "instead, or storage.accessModes: [ReadWriteMany]",
            )
    return None


def single_node_servers_do_not_spread(spec: "ModelCacheSpec") -> Problem | None:
    """Replicas on a ReadWriteOnce volume share its node."""
    if spec.storage.many_nodes or not spec.server.topology_spread_constraints:
        return None
    return Problem(
        ("server", "topologySpreadConstraints"),
        "a ReadWriteOnce volume is on one node, so replicas cannot spread; take them away, or write "
        "storage.accessModes: [ReadWriteMany]",
    )


def memory_holds_the_cache(spec: "ModelCacheSpec") -> Problem | None:
    """The arena is allocated whole: a lower limit would kill the server at once."""
    limit = spec.server.resources.limits.get("memory")
    if limit is None:
        return None
    cache = spec.server.cache_bytes or MINIMUM_CACHE_BYTES
    needed = cache + SERVER_OVERHEAD_BYTES
    if parse_quantity(limit) >= needed:
        return None
    what = f"cacheSize ({spec.server.cache_size})" if spec.server.cache_size else "the smallest cache (64Mi)"
    return Problem(
        ("server", "resources", "limits", "memory"),
        f"{limit} is too little for {what} and 256Mi beside it; write at least {-(-needed // MIB)}Mi",
    )


def warm_up_has_a_size_only_if_it_happens(spec: "ModelCacheSpec") -> Problem | None:
    """Nothing of a size would be warmed."""
    if spec.server.warmup or spec.server.warmup_size is None:
        return None
    return Problem(("server", "warmupSize"), "warmup: false warms nothing; take warmupSize away, or write warmup: true")


def token_access_names_accounts(spec: "ModelCacheSpec") -> Problem | None:
    """Without a ServiceAccount nobody could read."""
    access = spec.server.access
    if access.mode == "Token" and not access.service_accounts:
        return Problem(
            ("server", "access", "serviceAccounts"),
            "mode Token lets in only the ServiceAccounts listed; write at least one, such as {name: default}",
        )
    if access.mode == "Open" and access.service_accounts:
        return Problem(
            ("server", "access", "serviceAccounts"),
            "mode Open lets everybody in; write mode: Token, or take serviceAccounts away",
        )
    return None


def cluster_reads_no_folders(spec: "ModelCacheSpec") -> Problem | None:
    """A folder of some machine means nothing in a cluster, and would show nodes' files to whoever may write a spec."""
    if parse_repo_id(spec.repo_id).scheme != "file":
        return None
    return Problem(("repoId",), "file:// is for `modelcache up` on one machine; write org/name, s3:// or gs://")


SPEC_RULES: tuple[Rule, ...] = (
    revision_is_for_hubs,
    folder_needs_no_account,
    access_mode_can_be_shared,
    existing_claim_has_its_size,
    single_node_fetch_follows_server,
    single_node_servers_do_not_spread,
    memory_holds_the_cache,
    warm_up_has_a_size_only_if_it_happens,
    token_access_names_accounts,
)
"""Rules that hold everywhere."""

CLUSTER_RULES: tuple[Rule, ...] = (cluster_reads_no_folders,)
"""Rules that hold only in a cluster."""


def broken_rules(spec: "ModelCacheSpec", *, cluster: bool) -> list[Problem]:
    """All problems of a spec whose fields are valid one by one.

    Args:
        spec: The spec.
        cluster: Whether it is for a cluster (True) or for this machine.
    """
    rules = SPEC_RULES + CLUSTER_RULES if cluster else SPEC_RULES
    return [problem for rule in rules if (problem := rule(spec)) is not None]
