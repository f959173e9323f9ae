"""The weight server: Deployment, Services, and the ConfigMap with the cluster's public keys."""

from dataclasses import dataclass

from modelcache_api.quantities import parse_bytes, parse_duration
from modelcache_api.resource import ModelCacheSpec
from modelcache_api.rules import BLOCK_BYTES, MINIMUM_CACHE_BYTES, SERVER_OVERHEAD_BYTES
from modelcache_operator.resources import names, pod
from modelcache_operator.resources.names import Object
from modelcache_operator.settings import Settings

GRPC_PORT, HTTP_PORT, STATUS_PORT = 9090, 8080, 9091
MIB = 2**20
MOST_DEFAULT_CACHE_BYTES = 2**30
DRAIN_SECONDS, GRACE_SECONDS = 10, 20
KEYS_PATH = "/etc/modelcache/keys"
KEY_SET_FILE = "jwks.json"
_TLS_PATH = "/etc/modelcache/tls"
_REDIS_PATH = "/etc/modelcache/redis"


@dataclass(frozen=True)
class TokenKeys:
    """How ServiceAccount tokens of this cluster are verified offline.

    Attributes:
        issuer: ``iss`` of the tokens.
        key_set: JSON Web Key Set as text.
    """

    issuer: str
    key_set: str


def cache_bytes(spec: ModelCacheSpec, planned: int, live: Object | None) -> int:
    """Size of the block cache in bytes.

    Without spec.server.cacheSize it is the model's size at the first start, at most 1Gi, and then stays: a new
    revision of another size must not restart the servers.
    """
    if spec.server.cache_bytes is not None:
        return spec.server.cache_bytes
    limit = spec.server.resources.limits.get("memory")
    most = MOST_DEFAULT_CACHE_BYTES
    if limit is not None:
        most = min(most, parse_bytes(limit) - SERVER_OVERHEAD_BYTES)
    chosen = ((live or {}).get("metadata", {}).get("annotations") or {}).get(names.CACHE_SIZE_ANNOTATION, "")
    wanted = int(chosen) if chosen.isdigit() else -(-planned // BLOCK_BYTES) * BLOCK_BYTES
    return max(MINIMUM_CACHE_BYTES, min(wanted, most) // BLOCK_BYTES * BLOCK_BYTES)


def deployment(
    cr: Object,
    spec: ModelCacheSpec,
    settings: Settings,
    *,
    claim: str,
    many_nodes: bool,
    cache: int,
    replicas: int,
    keys: TokenKeys | None,
) -> Object:
    """The servers. A rolling update starts the new pod before the old one goes.

    Args:
        cr: The ModelCache.
        spec: The effective spec.
        settings: The operator's.
        claim: Name of the claim with the snapshots.
        many_nodes: Whether the claim can be mounted on several nodes.
        cache: Bytes of the block cache.
        replicas: How many servers; 0 while the claim is being replaced.
        keys: For access mode Token.
    """
    name = cr["metadata"]["name"]
    arguments = [
        "modelcache-server",
        pod.VOLUME_PATH,
        f"--name={name}",
        f"--cache-size={cache}",
        f"--warmup={_warmup(spec.server.warmup_bytes)}",
        f"--drain={DRAIN_SECONDS}",
        f"--grace={GRACE_SECONDS}",
    ]
    tmp, tmp_mount = pod.scratch()
    volumes: list[Object] = [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}, tmp]
    mounts: list[Object] = [
        {"name": "volume", "mountPath": pod.VOLUME_PATH, "readOnly": True},
        {"name": "volume", "mountPath": f"{pod.VOLUME_PATH}/leases", "subPath": "leases"},
        tmp_mount,
    ]
    _add_tls(spec, arguments, volumes, mounts)
    _add_redis(spec, arguments, volumes, mounts)
    if keys is not None:
        _add_access(cr, spec, keys, arguments, volumes, mounts)
    memory = {"requests": _mebibytes(cache + 128 * MIB), "limits": _mebibytes(cache + 2 * SERVER_OVERHEAD_BYTES)}
    resources = pod.resources_of(spec.server.resources) or {
        "requests": {"cpu": "100m", "memory": memory["requests"]},
        "limits": {"memory": memory["limits"]},
    }
    main = pod.container(
        settings,
        names.SERVER,
        arguments,
        ports=[
            {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "status", "containerPort": STATUS_PORT, "protocol": "TCP"},
        ],
        # warm-up takes as long as the volume takes: /healthz is good meanwhile, /readyz only afterwards
        startupProbe=_probe("/healthz", period=1, failures=120),
        readinessProbe=_probe("/readyz", period=2, failures=2),
        livenessProbe=_probe("/healthz", period=10, failures=6),
        volumeMounts=mounts,
        resources=resources,
    )
    pods = names.selector(name)
    placement = pod.server_placement(spec, claim, pods, many_nodes=many_nodes)
    template = {
        "metadata": {
            "labels": names.labels(name, names.SERVER) | {names.CLAIM_LABEL: names.claim_label(claim)},
        },
        "spec": pod.pod_spec(
            spec,
            settings,
            [main],
            volumes,
            placement,
            terminationGracePeriodSeconds=DRAIN_SECONDS + GRACE_SECONDS + 10,
        ),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": names.metadata(
            cr,
            names.weights_name(name),
            names.SERVER,
            annotations={
                names.CACHE_SIZE_ANNOTATION: str(cache),
                names.TEMPLATE_ANNOTATION: names.content_hash(template),
            },
        ),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": pods},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def services(cr: Object, spec: ModelCacheSpec) -> list[Object]:
    """The Service with a cluster IP, and the headless one for clients that balance themselves."""
    name = cr["metadata"]["name"]
    # what gateways and meshes go by, whatever a port's name
    grpc, http = ("https", "https") if spec.server.access.tls else ("kubernetes.io/h2c", "http")
    lanes = [
        {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "protocol": "TCP", "appProtocol": grpc},
        {"name": "http", "port": HTTP_PORT, "targetPort": "http", "protocol": "TCP", "appProtocol": http},
    ]
    status = {"name": "status", "port": STATUS_PORT, "targetPort": "status", "protocol": "TCP"}
    balanced = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(cr, names.weights_name(name), names.SERVER),
        "spec": {"type": "ClusterIP", "selector": names.selector(name), "ports": [*lanes, status]},
    }
    headless = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(cr, names.headless_name(name), f"{names.SERVER}-pods"),
        "spec": {"clusterIP": "None", "selector": names.selector(name), "ports": lanes},
    }
    return [balanced, headless]


def key_set(cr: Object, keys: TokenKeys) -> Object:
    """The cluster's public keys, so that servers need no right to ask the API server."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.metadata(cr, names.keys_name(cr["metadata"]["name"]), names.KEYS),
        "data": {KEY_SET_FILE: keys.key_set},
    }


def speaks_tls(deployment: Object) -> bool:
    """Whether the servers of a live Deployment are told to speak TLS."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    commands = [each.get("command") or [] for each in containers if each["name"] == names.SERVER]
    return any(argument.startswith("--tls-cert=") for command in commands for argument in command)


def _warmup(size: int | None) -> str:
    """The server's --warmup."""
    return "all" if size is None else str(size) if size else "none"


def _add_tls(spec: ModelCacheSpec, arguments: list[str], volumes: list[Object], mounts: list[Object]) -> None:
    if (tls := spec.server.access.tls) is None:
        return
    arguments += [f"--tls-cert={_TLS_PATH}/tls.crt", f"--tls-key={_TLS_PATH}/tls.key"]
    volumes.append({"name": "tls", "secret": {"secretName": tls.secret_name, "optional": True}})
    mounts.append({"name": "tls", "mountPath": _TLS_PATH, "readOnly": True})


def _add_redis(spec: ModelCacheSpec, arguments: list[str], volumes: list[Object], mounts: list[Object]) -> None:
    if (redis := spec.server.redis) is None:
        return
    arguments += [
        f"--redis-url-file={_REDIS_PATH}/redis_url",
        f"--redis-ttl={max(1, round(parse_duration(redis.ttl)))}",
    ]
    items = [{"key": "redis_url", "path": "redis_url"}]
    source = {"secretName": redis.secret_ref.name, "items": items, "optional": True}
    volumes.append({"name": "redis", "secret": source})
    mounts.append({"name": "redis", "mountPath": _REDIS_PATH, "readOnly": True})


def _add_access(
    cr: Object,
    spec: ModelCacheSpec,
    keys: TokenKeys,
    arguments: list[str],
    volumes: list[Object],
    mounts: list[Object],
) -> None:
    access = spec.server.access
    namespace = cr["metadata"]["namespace"]
    arguments += [
        f"--token-key-set={KEYS_PATH}/{KEY_SET_FILE}",
        f"--token-issuer={keys.issuer}",
        f"--token-audience={access.audience}",
        *(f"--allow={account.namespace or namespace}/{account.name}" for account in access.service_accounts),
    ]
    volumes.append({"name": "keys", "configMap": {"name": names.keys_name(cr["metadata"]["name"])}})
    mounts.append({"name": "keys", "mountPath": KEYS_PATH, "readOnly": True})


def _probe(path: str, *, period: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "status"},
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }


def _mebibytes(count: int) -> str:
    return f"{-(-count // MIB)}Mi"
