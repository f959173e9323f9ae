"""`modelcache serve`: serve what a volume holds."""

import argparse
from typing import TYPE_CHECKING

from modelcache_api.reasons import Reason
from modelcache_cli.command import Command
from modelcache_cli.failures import CommandError, UsageError
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_serving, add_volume, volume_root, whole_blocks
from modelcache_cli.serving import SERVE_REASONS, refuse_what_cannot_serve, serve_until_stopped
from modelcache_server import options as server_options

if TYPE_CHECKING:
    from modelcache_volume import Volume
    from modelcache_volume.v1.manifest_pb2 import Active

_MAXIMUM_DEFAULT_CACHE = 2**30


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_volume(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="which active model is served (default: the only one on the volume)"
    )
    add_serving(parser)
    server_options.add_common(parser, log_level="warning", log_format="text")


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_server import ServerSettings, logs
    from modelcache_volume import Volume

    logs.configure(arguments.log_level, arguments.log_format)
    root = volume_root(arguments)
    volume = Volume.open(root)
    active = _active(volume, arguments.name)
    refuse_what_cannot_serve(arguments)
    settings = ServerSettings(
        root=root,
        name=active.name,
        host=arguments.host,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        status_port=arguments.metrics_port,
        cache_bytes=arguments.cache_size or default_cache_bytes(volume, active),
    )
    try:
        settings = server_options.with_common(settings, arguments)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    return serve_until_stopped(arguments, settings, active.name)


def default_cache_bytes(volume: "Volume", active: "Active") -> int:
    """What a cache takes where nobody says: the active model's size, at most 1 GiB."""
    snapshot = volume.snapshot(active.digest, active.folder)
    return whole_blocks(min(sum(file.size for file in snapshot.manifest.files), _MAXIMUM_DEFAULT_CACHE))


def _active(volume: "Volume", name: str | None) -> "Active":
    """The active record to serve.

    Raises:
        CommandError: None is active, or several are and none was named.
    """
    if name is not None:
        return volume.active(name)
    actives = volume.actives()
    if not actives:
        raise CommandError(
            Reason.SNAPSHOT_NOT_FOUND,
            f"nothing is active on {volume.root}; fetch a model first: modelcache fetch -f FILE",
        )
    if len(actives) > 1:
        names = ", ".join(active.name for active in actives)
        raise CommandError(Reason.SNAPSHOT_NOT_FOUND, f"{volume.root} has several active models; write --name: {names}")
    return actives[0]


COMMAND = Command(
    name="serve",
    summary="serve the active model of a volume",
    description=(
        "Serves a volume over gRPC and HTTP until it is stopped by Ctrl-C or SIGTERM; running reads may finish "
        "within --grace. A model that another process fetches into the volume is served within a second, without a "
        "restart, and readers of the former one go on. Anybody who reaches the ports can read unless --token-key-set "
        "is given: listen on 127.0.0.1 unless the network is yours."
    ),
    examples=(
        ("modelcache serve", "serve the default volume on this machine"),
        (
            "modelcache serve --volume /mnt/models --name bert --host 0.0.0.0 --cache-size 4Gi",
            "serve one model to the network with a cache of 4 GiB",
        ),
        (
            "modelcache serve --host 0.0.0.0 --tls-cert tls.crt --tls-key tls.key --log-level info --log-format json",
            "serve over TLS, with a line of JSON for each request",
        ),
    ),
    add_options=_add_options,
    run=_run,
    reasons=SERVE_REASONS,
    environment=(
        *VOLUME_ENVIRONMENT,
        (server_options.REDIS_URL_VARIABLE, "URL of a Redis that replicas share, where --redis-url-file is absent"),
    ),
)
