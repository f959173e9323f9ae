"""The server's command line, also that of `modelcache serve`; the only place that reads the environment."""

import argparse
import os
import re
from pathlib import Path

from modelcache_server.settings import (
    MIN_CACHE_BYTES,
    RedisSettings,
    ServerSettings,
    TlsSettings,
    TokenSettings,
)
from modelcache_volume import BLOCK_BYTES

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d{1,15})(k|M|G|T|Ki|Mi|Gi|Ti)?")
REDIS_URL_VARIABLE = "MODELCACHE_REDIS_URL"


def parse_size(text: str) -> int:
    """Bytes of a size as Kubernetes writes it, such as 512Mi or 2Gi."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write bytes or a number with Ki, Mi, Gi or Ti")
    return int(match[1]) * _UNITS[match[2] or ""]


def parse_cache_size(text: str) -> int:
    """As `parse_size`, up to whole blocks of 4 MiB."""
    size = -(-parse_size(text) // BLOCK_BYTES) * BLOCK_BYTES
    if size < MIN_CACHE_BYTES:
        raise argparse.ArgumentTypeError(f"a cache of {text} is too small: at least 64Mi are needed")
    return size


def parse_warmup(text: str) -> int | None:
    """Bytes to warm up: all (None), none, or a size."""
    return None if text == "all" else 0 if text == "none" else parse_size(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's options to a parser."""
    parser.add_argument("root", type=Path, metavar="FOLDER", help="a volume, or a plain folder of safetensors files")
    parser.add_argument("--name", default="", help="whose active revision is served (default: the only one)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")  # noqa: S104
    network.add_argument("--port", type=_port, default=9090, help="gRPC (default: 9090; 0: any free port)")
    network.add_argument("--http-port", type=_port, default=8080, help="bytes over HTTP (default: 8080)")
    network.add_argument("--status-port", type=_port, default=9091, help="/healthz /readyz /metrics (default: 9091)")
    network.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM); reloaded on change")
    network.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--cache-size", type=parse_cache_size, default=1 << 30, metavar="SIZE", help="memory for blocks (default: 1Gi)"
    )
    cache.add_argument(
        "--warmup", type=parse_warmup, default=None, metavar="all|none|SIZE", help="load before ready (default: all)"
    )
    cache.add_argument("--read-ahead", type=int, default=4, metavar="BLOCKS", help="4 MiB blocks ahead (default: 4)")
    cache.add_argument(
        "--redis-url-file", type=Path, metavar="FILE", help=f"file with a Redis URL (or set {REDIS_URL_VARIABLE})"
    )
    cache.add_argument(
        "--redis-ttl", type=int, default=86400, metavar="SECONDS", help="of blocks there (default: a day)"
    )
    access = parser.add_argument_group("access (all four together: only tokens of these accounts may read)")
    access.add_argument("--token-key-set", type=Path, metavar="FILE", help="JSON Web Key Set; reloaded on change")
    access.add_argument("--token-issuer", metavar="ISS", help="the tokens' issuer")
    access.add_argument("--token-audience", metavar="AUD", help="the tokens' audience")
    access.add_argument(
        "--allow", action="append", default=[], metavar="NAMESPACE/NAME", help="service account; repeat; NAME may be *"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--inflight", type=parse_size, metavar="SIZE", help="bytes being sent (default: 3/4 of the cache)"
    )
    limits.add_argument("--max-streams", type=int, default=64, metavar="N", help="gRPC reads at once (default: 64)")
    limits.add_argument(
        "--drain", type=float, default=0.0, metavar="SECONDS", help="serve on, unready, before stopping"
    )
    limits.add_argument(
        "--grace", type=float, default=20.0, metavar="SECONDS", help="for reads to finish (default: 20)"
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    logs.add_argument("--log-format", choices=("json", "text"), default="json")


def settings_from(args: argparse.Namespace) -> ServerSettings:
    """The settings that parsed arguments mean.

    Raises:
        ValueError: they contradict each other.
        OSError: a named file cannot be read.
    """
    return ServerSettings(
        root=args.root,
        name=args.name,
        host=args.host,
        grpc_port=args.port,
        http_port=args.http_port,
        status_port=args.status_port,
        cache_bytes=args.cache_size,
        warmup_bytes=args.warmup,
        drain_seconds=args.drain,
        inflight_bytes=args.inflight,
        max_streams=args.max_streams,
        read_ahead=args.read_ahead,
        tls=_tls(args),
        tokens=_tokens(args),
        redis=_redis(args),
    )


def _tls(args: argparse.Namespace) -> TlsSettings | None:
    if args.tls_cert is None and args.tls_key is None:
        return None
    if args.tls_cert is None or args.tls_key is None:
        raise ValueError("--tls-cert and --tls-key belong together: give both")
    return TlsSettings(args.tls_cert, args.tls_key)


def _tokens(args: argparse.Namespace) -> TokenSettings | None:
    given = (args.token_key_set, args.token_issuer, args.token_audience, args.allow)
    if not any(given):
        return None
    if not all(given):
        raise ValueError("--token-key-set, --token-issuer, --token-audience and --allow belong together: give all four")
    return TokenSettings(args.token_key_set, args.token_issuer, args.token_audience, tuple(args.allow))


def _redis(args: argparse.Namespace) -> RedisSettings | None:
    if args.redis_url_file is not None:
        url = args.redis_url_file.read_text(encoding="utf-8").strip()
    else:
        url = os.environ.get(REDIS_URL_VARIABLE, "")
    return RedisSettings(url, ttl_seconds=args.redis_ttl) if url else None


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: write a number from 0 to 65535")
    return int(text)
