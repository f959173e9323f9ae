"""The rules of the spec in CEL, checked by the API server at `kubectl apply`, with the sentence the user reads.

Each says what `rules` and the validators of `resource` say in Python. Every string and list is bounded, because the API
server refuses rules whose cost it cannot bound (https://kubernetes.io/docs/reference/using-api/cel/#resource-use).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One validation.

    Attributes:
        rule: The CEL expression; true is good.
        message: What to write instead.
        field_path: The field to blame, relative to where the rule hangs; "" is there.
    """

    rule: str
    message: str
    field_path: str = ""

    def to_schema(self) -> dict[str, str]:
        """As ``x-kubernetes-validations`` wants it."""
        schema = {"rule": self.rule, "message": self.message}
        return schema | {"fieldPath": self.field_path} if self.field_path else schema


_FORMS = "write org/name, hf://org/name, s3://bucket/prefix or gs://bucket/prefix"
_REPO = r"^(hf://)?[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?(/[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?)?$"
_S3 = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$"
_GCS = r"^(gs|gcs)://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?$"
_BAD_PREFIX = r"^(s3|gs|gcs)://([^/]*[.][.]|[^/]+/(.*/)?([.]{0,2}/+[^/]|[.]{1,2}/*$))"
_DURATION = r"^([0-9]+(\\.[0-9]+)?h)?([0-9]+(\\.[0-9]+)?m)?([0-9]+(\\.[0-9]+)?s)?([0-9]+ms)?$"
_IS_HUB = "!self.repoId.startsWith('s3://') && !self.repoId.startsWith('gs://') && !self.repoId.startsWith('gcs://')"
_MANY_NODES = "'ReadWriteMany' in self.storage.accessModes"


def _duration(at_least: str) -> str:
    return f"self.matches('{_DURATION}') && duration(self) >= duration('{at_least}')"


def _positive_quantity(name: str, example: str) -> Rule:
    return Rule(
        "type(self) == int ? self > 0 : (isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))",
        f"{name} must be a positive quantity such as {example}",
    )


def _single_node_fetch(name: str, *, countable: bool = True) -> Rule:
    return Rule(
        f"{_MANY_NODES} || !has(self.fetch.{name})" + (f" || size(self.fetch.{name}) == 0" if countable else ""),
        f"a ReadWriteOnce volume is on one node, so fetches run where the server does; write server.{name} instead, "
        "or storage.accessModes: [ReadWriteMany]",
        f".fetch.{name}",
    )


def _unchanged(name: str) -> Rule:
    """On the parent: a rule on the field itself is not evaluated when the field is set or taken away."""
    return Rule(
        f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
        f"{name} is immutable: a volume cannot change it; make a ModelCache of another name instead",
        f".{name}",
    )


VALIDATIONS: dict[str, list[Rule]] = {
    "": [
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters, as Services, Jobs and pods add endings of their own",
        ),
        Rule(
            "self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')",
            "metadata.name must be a Service name: lower-case letters, digits and '-', beginning with a letter; "
            "write bert-base instead of bert.base or 1bert",
        ),
    ],
    "spec": [
        Rule(
            f"!has(self.revision) || ({_IS_HUB})",
            "only a Hugging Face repo has revisions; take revision away, a bucket is identified by its listing",
            ".revision",
        ),
        _single_node_fetch("nodeSelector"),
        _single_node_fetch("tolerations"),
        _single_node_fetch("affinity", countable=False),
        Rule(
            f"{_MANY_NODES} || !has(self.server.topologySpreadConstraints) "
            "|| size(self.server.topologySpreadConstraints) == 0",
            "a ReadWriteOnce volume is on one node, so replicas cannot spread; take topologySpreadConstraints away, or "
            "write storage.accessModes: [ReadWriteMany]",
            ".server.topologySpreadConstraints",
        ),
    ],
    "spec.repoId": [
        Rule("!self.startsWith('file://')", "file:// is for `modelcache up` on one machine; " + _FORMS),
        Rule(
            "self.startsWith('file://') || "
            + " || ".join(f"self.matches('{pattern}')" for pattern in (_REPO, _S3, _GCS)),
            "repoId names no source; "
            + _FORMS
            + " (another hub's address belongs in endpoint, a revision in revision)",
        ),
        Rule(
            "self.contains('://') && !self.startsWith('hf://') || !self.contains('--') && !self.contains('..') "
            "&& size(self.replace('hf://', '')) <= 96",
            "a Hugging Face repo's name has at most 96 characters and cannot contain '--' or '..'",
        ),
        Rule(
            f"!self.matches('{_BAD_PREFIX}')",
            "a bucket's name cannot contain '..', nor its prefix an empty, '.' or '..' part; write s3://bucket/prefix",
        ),
    ],
    "spec.revision": [
        Rule(
            r"!self.matches('[\\x00-\\x20\\x7f~^:?*\\[\\\\]') && !self.contains('..') && !self.startsWith('-') "
            r"&& !self.startsWith('/') && !self.startsWith('.') && !self.endsWith('/') && !self.endsWith('.') "
            "&& !self.endsWith('.lock') && !self.contains('//') && !self.contains('@{')",
            "revision must be a branch, tag or commit, such as main, v1.0 or a commit's 40 hex digits",
        )
    ],
    "spec.allowPatterns.*": [
        Rule(
            "size(self.trim()) > 0 && !self.startsWith('/') && !self.startsWith('./') && !self.startsWith('../')",
            "patterns are on the path inside the repo, such as *.safetensors or onnx/*",
        )
    ],
    "spec.ignorePatterns.*": [
        Rule(
            "size(self.trim()) > 0 && !self.startsWith('/') && !self.startsWith('./') && !self.startsWith('../')",
            "patterns are on the path inside the repo, such as *.bin or onnx/*",
        )
    ],
    "spec.endpoint": [
        Rule(
            "isURL(self) && url(self).getScheme() in ['http', 'https'] && url(self).getHostname() != '' "
            "&& !self.contains('@') && !self.contains('?') && !self.contains('#')",
            "endpoint must be an http:// or https:// URL without credentials or query, such as https://hub.example.com",
        )
    ],
    "spec.refresh.interval": [
        Rule(
            _duration("5m"),
            "interval must be a duration of at least 5m, such as 10m: sources limit how often they are asked",
        )
    ],
    "spec.storage": [
        _unchanged("storageClassName"),
        _unchanged("accessModes"),
        _unchanged("existingClaim"),
        Rule(
            "!has(self.existingClaim) || !has(self.size)",
            "existingClaim is a volume that exists already; take size away",
            ".size",
        ),
        Rule(
            "!has(self.existingClaim) || !has(self.storageClassName)",
            "existingClaim is a volume that exists already; take storageClassName away",
            ".storageClassName",
        ),
    ],
    "spec.storage.size": [_positive_quantity("size", "20Gi")],
    "spec.storage.accessModes": [
        Rule(
            "!('ReadWriteOncePod' in self)",
            "ReadWriteOncePod lets only one pod mount the volume, but the fetch and the servers do so together; write "
            "ReadWriteOnce or ReadWriteMany",
        ),
        Rule(
            "self.all(mode, mode in ['ReadWriteOnce', 'ReadWriteMany', 'ReadWriteOncePod'])",
            "a fetch writes to the volume; write ReadWriteOnce or ReadWriteMany",
        ),
    ],
    "spec.fetch.stallTimeout": [Rule(_duration("1s"), "stallTimeout must be a duration of at least 1s, such as 5m")],
    "spec.server": [
        Rule(
            "!has(self.resources) || !has(self.resources.limits) || !('memory' in self.resources.limits) || "
            "!isQuantity(string(self.resources.limits['memory'])) || "
            "quantity(string(self.resources.limits['memory'])).compareTo(quantity("
            "has(self.cacheSize) && isQuantity(string(self.cacheSize)) ? string(self.cacheSize) : '64Mi'"
            ").add(quantity('256Mi'))) >= 0",
            "limits.memory is too little: write at least cacheSize (or 64Mi, the smallest cache) and 256Mi beside it",
            ".resources.limits",
        ),
        Rule(
            "!has(self.warmupSize) || !has(self.warmup) || self.warmup",
            "warmup: false warms nothing; take warmupSize away, or write warmup: true",
            ".warmupSize",
        ),
    ],
    "spec.server.warmupSize": [_positive_quantity("warmupSize", "2Gi")],
    "spec.server.cacheSize": [
        Rule(
            "isQuantity(string(self)) && quantity(string(self)).isInteger() && "
            "quantity(string(self)).compareTo(quantity('64Mi')) >= 0 && "
            "quantity(string(self)).asInteger() % 4194304 == 0",
            "cacheSize must be a multiple of 4Mi, the size of a cache block, and at least 64Mi",
        )
    ],
    "spec.server.redis.ttl": [Rule(_duration("1s"), "ttl must be a duration of at least 1s, such as 24h")],
    "spec.server.access": [
        Rule(
            "!has(self.mode) || self.mode != 'Token' || (has(self.serviceAccounts) && size(self.serviceAccounts) > 0)",
            "mode Token lets in only the ServiceAccounts listed; write at least one, such as {name: default}",
            ".serviceAccounts",
        ),
        Rule(
            "!has(self.mode) || self.mode != 'Open' || !has(self.serviceAccounts) || size(self.serviceAccounts) == 0",
            "mode Open lets everybody in; write mode: Token, or take serviceAccounts away",
            ".serviceAccounts",
        ),
    ],
}
"""Rules by the path of the schema they hang on; ``*`` are a list's items."""
