"""`modelcache fetch`: bring a model onto a volume."""

import argparse

from modelcache_cli.command import Command
from modelcache_cli.fetching import PUBLISH_REASONS, fetch
from modelcache_cli.options import VOLUME_ENVIRONMENT, add_manifest, add_volume, add_wait, volume_root


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_manifest(parser)
    add_volume(parser)
    add_wait(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read what the volume has of the source again first, and fetch anew what is damaged",
    )


def _run(arguments: argparse.Namespace) -> int:
    from modelcache_api.load import load_manifest

    fetch(arguments, load_manifest(arguments.filename), volume_root(arguments), verify=arguments.verify)
    return 0


COMMAND = Command(
    name="fetch",
    summary="fetch a model into a volume, verified, and make it the active one",
    description=(
        "Plans, downloads what the volume lacks, verifies it, publishes the snapshot and makes it active under the "
        "manifest's name; a server on the same volume takes it within a second. Can be stopped anywhere and run "
        "again: what was received is not fetched twice, and what was active stays so until the new snapshot is "
        "whole. Shows a bar on a terminal, else one line of JSON a second on standard output."
    ),
    examples=(
        ("modelcache fetch -f minilm.yaml", "fetch into the default volume"),
        ("modelcache fetch -f minilm.yaml --verify", "the same, and mend what is damaged on the volume"),
        ("modelcache fetch -f gated.yaml --secrets ~/.secrets/hf", "with a token in the file hf_access_token there"),
    ),
    add_options=_add_options,
    run=_run,
    reasons=PUBLISH_REASONS,
    environment=VOLUME_ENVIRONMENT,
)
