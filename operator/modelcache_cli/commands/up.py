"""`modelcache up`: the life cycle of a ModelCache on this machine."""

import argparse
from typing import TYPE_CHECKING

from modelcache_api.reasons import Reason
from modelcache_cli.command import Command
from modelcache_cli.commands.serve import default_cache_bytes
from modelcache_cli.commands.verify import verify_snapshot
from modelcache_cli.failures import CommandError
from modelcache_cli.fetching import PUBLISH_REASONS, fetch
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_manifest, add_serving, add_volume, add_wait, volume_root
from modelcache_cli.output import say
from modelcache_cli.serving import SERVE_REASONS, refuse_what_cannot_serve, serve_until_stopped

if TYPE_CHECKING:
    from modelcache_api.resource import ModelCacheSpec
    from modelcache_volume import Volume
    from modelcache_volume.v1.manifest_pb2 import Active


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_manifest(parser)
    add_volume(parser)
    add_wait(parser)
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read the snapshot again before serving it; the server checks each block when it loads it anyway",
    )
    add_serving(parser)


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_api.load import load_manifest
    from modelcache_server import ServerSettings
    from modelcache_volume import Volume

    model = load_manifest(arguments.filename)
    root, name, spec = volume_root(arguments), model.metadata.name, model.spec
    _say_what_needs_a_cluster(spec)
    if spec.server.replicas:
        refuse_what_cannot_serve(arguments)
    if spec.suspend:
        say("spec.suspend is true: nothing is fetched, what is on the volume is served")
    else:
        fetch(arguments, model, root)
    volume = Volume.open(root)
    active = volume.active(name)
    if not arguments.no_verify and (damage := _damage(volume, active)):
        if spec.suspend:
            raise CommandError(Reason.CORRUPT_BLOB, damage)
        for line in damage.splitlines():
            say(line)
        fetch(arguments, model, root, verify=True)
        active = volume.active(name)
    if not spec.server.replicas:
        _say_where_files_are(volume, active)
        return 0
    settings = ServerSettings(
        root=root,
        name=name,
        host=arguments.host,
        grpc_port=arguments.grpc_port,
        http_port=arguments.http_port,
        status_port=arguments.metrics_port,
        cache_bytes=arguments.cache_size or spec.server.cache_bytes or default_cache_bytes(volume, active),
        warmup_bytes=spec.server.warmup_bytes,
    )
    return serve_until_stopped(arguments, settings, name)


def _say_what_needs_a_cluster(spec: "ModelCacheSpec") -> None:
    """A field that protects or speeds up in a cluster must not be thought to do so here."""
    if spec.server.access.mode == "Token" or spec.server.access.tls is not None:
        say("note: spec.server.access is not applied on one machine; whoever reaches --host can read")
    ignored = [
        field
        for field, given in (
            ("spec.server.redis", spec.server.redis is not None),
            ("spec.server.replicas above 1", spec.server.replicas > 1),
            ("spec.storage.size", spec.storage.size is not None),
        )
        if given
    ]
    if ignored:
        say(f"note: {', '.join(ignored)}: not applied on one machine")
    if spec.refresh is not None:
        say("note: spec.refresh is not applied on one machine; run `modelcache fetch` to look again")


def _damage(volume: "Volume", active: "Active") -> str:
    """What is wrong with the active snapshot, a sentence a line; empty when it is whole."""
    return "\n".join(problem.what for problem in verify_snapshot(volume.snapshot(active.digest, active.folder)))


def _say_where_files_are(volume: "Volume", active: "Active") -> None:
    folder = volume.snapshot(active.digest, active.folder).commit_folder()
    say(f"spec.server.replicas is 0: nothing is served; the files are in {folder}")
    say(f"programs that use huggingface_hub find them with HF_HUB_CACHE={volume.root / 'hub'} HF_HUB_OFFLINE=1")


COMMAND = Command(
    name="up",
    summary="fetch, verify and serve a model on this machine, from the manifest that a cluster takes",
    description=(
        "Reads a ModelCache manifest and does here what the operator does in a cluster: plans, fetches what the "
        "volume lacks, verifies the snapshot, and serves it on localhost until Ctrl-C. Prints the address and what "
        "to paste into Python. Run again, it downloads only what changed. A repoId may also be a folder: "
        "file:///dir, or relative to the manifest file://./dir."
    ),
    examples=(
        ("modelcache up -f minilm.yaml", "serve on localhost:9090 until Ctrl-C"),
        (
            "modelcache up -f minilm.yaml --grpc-port 0 --http-port 0 --metrics-port 0 --ready-file ready.json",
            "any free ports, for a script that reads the addresses from ready.json",
        ),
    ),
    add_options=_add_options,
    run=_run,
    reasons=tuple(dict.fromkeys((*PUBLISH_REASONS, *SERVE_REASONS))),
    environment=VOLUME_ENVIRONMENT,
)
