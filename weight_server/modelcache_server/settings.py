"""Everything that can be chosen about a weight server, with its defaults."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

from modelcache_volume import BLOCK_BYTES

MIB = 1 << 20
MIN_CACHE_BYTES = 64 * MIB
MAX_PORT = 65535


@dataclass(frozen=True)
class TlsSettings:
    """Where the server's certificate chain and private key are (PEM); both are read anew when they change."""

    certificate: Path
    private_key: Path


@dataclass(frozen=True)
class TokenSettings:
    """Which bearer tokens are accepted on both lanes; health and metrics stay open.

    Attributes:
        key_set: file with a JSON Web Key Set (RFC 7517), as Kubernetes serves at /openid/v1/jwks; read anew on change.
        issuer: the only accepted `iss`.
        audience: must be among the token's `aud`.
        service_accounts: allowed subjects as `NAMESPACE/NAME`, or `NAMESPACE/*` for all of a namespace.
    """

    key_set: Path
    issuer: str
    audience: str
    service_accounts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.service_accounts:
            raise ValueError("no service account is allowed: name at least one as NAMESPACE/NAME or NAMESPACE/*")
        for account in self.service_accounts:
            namespace, slash, name = account.partition("/")
            if not (namespace and slash and name) or "/" in name:
                raise ValueError(f"{account!r} is not a service account: write NAMESPACE/NAME or NAMESPACE/*")


@dataclass(frozen=True)
class RedisSettings:
    """The second tier that replicas share.

    Attributes:
        url: redis://, rediss:// or unix:// URL; user and password may be in it, it is never logged.
        ttl_seconds: how long a block stays there after it was written.
        timeout_seconds: for connecting and for each answer; a slower Redis is left alone for a while.
    """

    url: str = field(repr=False)
    ttl_seconds: int = 24 * 3600
    timeout_seconds: float = 1.0


@dataclass(frozen=True)
class HttpLimits:
    """What one HTTP client may use before its connection is closed.

    Attributes:
        connections: open at once, of all clients; one more gets 503.
        header_bytes: size of a request's line and headers together.
        header_seconds: from a request's first byte to the end of its headers (also for the TLS handshake).
        idle_seconds: between two requests of a kept connection.
        stall_seconds: without one byte taken by the reader.
    """

    connections: int = 1024
    header_bytes: int = 16 * 1024
    header_seconds: float = 10.0
    idle_seconds: float = 120.0
    stall_seconds: float = 30.0


@dataclass(frozen=True)
class ServerSettings:
    """A weight server over one volume, or over a plain folder of weights.

    Attributes:
        root: the volume's root, or a plain folder that holds safetensors files.
        name: whose active pointer is served (the ModelCache's name); empty: the only one on the volume.
        host: address that all ports listen on.
        grpc_port: 0 takes a free one; so for all ports.
        http_port: the bytes' lane.
        status_port: /healthz, /readyz and /metrics.
        cache_bytes: size of the block arena: a multiple of 4 MiB, at least 64 MiB.
        warmup_bytes: how much of the active snapshot is loaded before the server is ready; None: all that fits.
        poll_seconds: how often the active pointer is looked at.
        drain_seconds: how long a stopping server, already unready, still accepts new work.
        inflight_bytes: being sent at once, one client at most half of it; None: three quarters of the cache.
        queue_seconds: how long a request may wait for its turn before it is told to come again.
        max_streams: gRPC Reads at once.
        read_ahead: blocks loaded ahead of a reader that misses; 0: none.
        lease_holder: this replica's name in the volume's leases.
        congestion_control: TCP's, of what is sent over HTTP; empty: the system's, but Cubic or Reno in place of BBR.
    """

    root: Path
    name: str = ""
    host: str = "0.0.0.0"  # noqa: S104 - a server in a pod is there to be reached
    grpc_port: int = 9090
    http_port: int = 8080
    status_port: int = 9091
    cache_bytes: int = 1024 * MIB
    warmup_bytes: int | None = None
    poll_seconds: float = 0.5
    drain_seconds: float = 0.0
    inflight_bytes: int | None = None
    queue_seconds: float = 30.0
    max_streams: int = 64
    read_ahead: int = 4
    lease_holder: str = field(default_factory=socket.gethostname)
    congestion_control: str = ""
    http: HttpLimits = field(default_factory=HttpLimits)
    tls: TlsSettings | None = None
    tokens: TokenSettings | None = None
    redis: RedisSettings | None = None

    def __post_init__(self) -> None:
        if self.cache_bytes < MIN_CACHE_BYTES or self.cache_bytes % BLOCK_BYTES:
            raise ValueError(
                f"a cache of {self.cache_bytes} bytes is not possible: "
                f"take a multiple of {BLOCK_BYTES // MIB} MiB, at least {MIN_CACHE_BYTES // MIB} MiB"
            )
        if self.inflight_bytes is not None and self.inflight_bytes < BLOCK_BYTES:
            raise ValueError(f"inflight_bytes of {self.inflight_bytes} is less than one block of {BLOCK_BYTES} bytes")


def cache_bytes_of(mebibytes: int) -> int:
    """A cache size in MiB as the settings want it: up to the next multiple of 4 MiB, at least 64 MiB."""
    blocks = -(-mebibytes * MIB // BLOCK_BYTES)
    return max(MIN_CACHE_BYTES, blocks * BLOCK_BYTES)
