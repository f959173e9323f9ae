"""The server's command line, also that of `modelcache serve`; the only place that reads the environment."""

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

from modelcache_server.settings import (
    MAX_PORT,
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


def parse_port(text: str) -> int:
    """A TCP port, 0 for any."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: write a number from 0 to {MAX_PORT}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's options to a parser."""
    parser.add_argument("root", type=Path, metavar="FOLDER", help="a volume, or a plain folder of safetensors files")
    parser.add_argument("--name", default="", help="whose active revision is served (default: the only one)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")  # noqa: S104
    network.add_argument("--port", type=parse_port, default=9090, help="gRPC (default: 9090; 0: any free port)")
    network.add_argument("--http-port", type=parse_port, default=8080, help="bytes over HTTP (default: 8080)")
    network.add_argument(
        "--status-port", type=parse_port, default=9091, help="/healthz /readyz /metrics (default: 9091)"
    )
    parser.add_argument(
        "--cache-size", type=parse_cache_size, default=1 << 30, metavar="SIZE", help="memory for blocks (default: 1Gi)"
    )
    parser.add_argument(
        "--grace", type=float, default=20.0, metavar="SECONDS", help="for reads to finish (default: 20)"
    )
    add_common(parser, log_level="info", log_format="json")


def add_common(parser: argparse.ArgumentParser, *, log_level: str, log_format: str) -> None:
    """Add what `modelcache-server` and `modelcache serve` both take, in the same words."""
    add = parser.add_argument
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain of both lanes (PEM); reloaded on change")
    add("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    add(
        "--warmup",
        type=parse_warmup,
        default=None,
        metavar="all|none|SIZE",
        help="what is in the cache before the server is ready (default: all that fits)",
    )
    add("--read-ahead", type=int, default=4, metavar="BLOCKS", help="4 MiB blocks loaded ahead (default: 4)")
    add(
        "--redis-url-file",
        type=Path,
        metavar="FILE",
        help=f"file with the URL of a Redis that replicas share (default: ${REDIS_URL_VARIABLE}, or else none)",
    )
    add("--redis-ttl", type=int, default=86400, metavar="SECONDS", help="of blocks in Redis (default: 86400, a day)")
    add(
        "--token-key-set",
        type=Path,
        metavar="FILE",
        help="JSON Web Key Set (reloaded on change): only bearer tokens signed by its keys may read; needs the next "
        "three (default: everybody may read)",
    )
    add("--token-issuer", metavar="ISS", help="the tokens' issuer")
    add("--token-audience", metavar="AUD", help="the tokens' audience")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="NAMESPACE/NAME",
        help="service account that may read; repeat it for more; NAME may be *",
    )
    add("--inflight", type=parse_size, metavar="SIZE", help="bytes being sent at once (default: 3/4 of the cache)")
    add("--max-streams", type=int, default=64, metavar="N", help="gRPC reads at once (default: 64)")
    add(
        "--congestion-control",
        default="",
        metavar="NAME",
        help="TCP's, of what is sent over HTTP (default: the system's, but cubic in place of bbr, which paces)",
    )
    add(
        "--drain",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="serve on, unready, before stopping (default: not at all)",
    )
    add(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=log_level,
        metavar="debug|info|warning|error",
        help=f"lowest level that is logged; info has a line for each request (default: {log_level})",
    )
    add(
        "--log-format",
        choices=("json", "text"),
        default=log_format,
        metavar="json|text",
        help=f"form of a log line (default: {log_format})",
    )


def settings_from(args: argparse.Namespace) -> ServerSettings:
    """The settings that parsed arguments of `add_arguments` mean. Raises as `with_common`."""
    settings = ServerSettings(
        root=args.root,
        name=args.name,
        host=args.host,
        grpc_port=args.port,
        http_port=args.http_port,
        status_port=args.status_port,
        cache_bytes=args.cache_size,
    )
    return with_common(settings, args)


def with_common(settings: ServerSettings, args: argparse.Namespace) -> ServerSettings:
    """The settings with what the options of `add_common` say.

    Raises:
        ValueError: they contradict each other.
        OSError: a named file cannot be read.
    """
    return replace(
        settings,
        warmup_bytes=args.warmup,
        drain_seconds=args.drain,
        inflight_bytes=args.inflight,
        max_streams=args.max_streams,
        read_ahead=args.read_ahead,
        congestion_control=args.congestion_control,
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
