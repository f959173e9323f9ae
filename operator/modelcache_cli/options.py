"""Options that several commands share, and the one place that reads the environment."""

import argparse
import os
import re
from pathlib import Path

from modelcache_api.quantities import parse_bytes, parse_duration
from modelcache_server.options import parse_port

VOLUME_VARIABLE = "MODELCACHE_VOLUME"
ADDRESS_VARIABLE = "MODELCACHE_ADDRESS"
VOLUME_ENVIRONMENT = (
    (VOLUME_VARIABLE, "folder of the volume, where --volume is absent"),
    ("XDG_DATA_HOME", "base of the volume's default folder (default ~/.local/share)"),
)
DEFAULT_GRPC_PORT = 9090
DEFAULT_HTTP_PORT = 8080
DEFAULT_METRICS_PORT = 9091
BLOCK_BYTES = 4 * 2**20
MINIMUM_CACHE_BYTES = 64 * 2**20


def default_volume() -> Path:
    """The volume's folder where no option names one."""
    named = os.environ.get(VOLUME_VARIABLE)
    if named and named != "off":  # "off" tells the client to map no volume; it names no folder.
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "modelcache"


def default_address() -> str | None:
    """The server's address where no option names one."""
    return os.environ.get(ADDRESS_VARIABLE) or None


def volume_root(arguments: argparse.Namespace) -> Path:
    """The volume's folder as an absolute path."""
    chosen: Path | None = arguments.volume
    return (chosen if chosen is not None else default_volume()).expanduser().absolute()


def add_volume(parser: argparse.ArgumentParser) -> None:
    """--volume."""
    parser.add_argument(
        "--volume",
        type=Path,
        metavar="DIR",
        help=f"folder of the volume (default: ${VOLUME_VARIABLE}, or else ~/.local/share/modelcache)",
    )


def add_manifest(parser: argparse.ArgumentParser) -> None:
    """-f and --secrets."""
    parser.add_argument(
        "-f",
        "--filename",
        required=True,
        metavar="FILE",
        help="manifest (YAML or JSON) of one ModelCache; - reads standard input",
    )
    parser.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="folder with the keys of spec.secretRef as files: hf_access_token, s3_credentials.json or "
        "service_account.json (default: none, anonymous)",
    )


def add_wait(parser: argparse.ArgumentParser) -> None:
    """--wait."""
    parser.add_argument(
        "--wait",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="how long to wait for another process that writes to the volume, such as 10m (default: not at all)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes and digests in full")


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Addresses, cache and grace of a weight server."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    for names, port, what in (
        (("--grpc-port", "--port"), DEFAULT_GRPC_PORT, "gRPC API, which clients connect to"),
        (("--http-port",), DEFAULT_HTTP_PORT, "HTTP lane, which carries the bytes"),
        (("--metrics-port", "--status-port"), DEFAULT_METRICS_PORT, "/metrics, /healthz and /readyz"),
    ):
        parser.add_argument(
            *names,
            type=parse_port,
            default=port,
            metavar="PORT",
            help=f"{what}; 0: any free port (default: %(default)s)",
        )
    parser.add_argument(
        "--cache-size",
        type=cache_size,
        metavar="SIZE",
        help="memory of the block cache, such as 512Mi or 2Gi; rounded up to a multiple of 4Mi, at least 64Mi "
        "(default: the model's size, at most 1Gi)",
    )
    parser.add_argument(
        "--grace",
        type=duration,
        default=5.0,
        metavar="TIME",
        help="how long running reads may finish after the server was asked to stop, such as 30s (default: 5s)",
    )
    parser.add_argument(
        "--ready-file",
        type=Path,
        metavar="PATH",
        help="file written when the server is ready, for scripts: JSON with name, volume and the addresses grpc, http "
        "and metrics; removed when the server stops (default: none)",
    )


def duration(text: str) -> float:
    """Seconds of "10m", "90s" or "1h30m"."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_size(text: str) -> int:
    """Bytes of a block cache: up to the next multiple of 4 MiB."""
    try:
        return whole_blocks(parse_bytes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_blocks(count: int) -> int:
    """A cache of at least so many bytes as the server wants it: a multiple of 4 MiB, at least 64 MiB."""
    return max(MINIMUM_CACHE_BYTES, -(-count // BLOCK_BYTES) * BLOCK_BYTES)


def digest_prefix(text: str) -> str:
    """A snapshot's digest or its first characters, at least 8."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no digest; write 8 to 64 hex digits, as `modelcache ls` shows")
    return text
