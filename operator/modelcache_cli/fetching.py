"""From a manifest file to files on the volume: what `plan`, `fetch` and `up` share."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache_api.quantities import format_bytes
from modelcache_api.reasons import Reason
from modelcache_cli.failures import CommandError
from modelcache_cli.output import ProgressDisplay, say

if TYPE_CHECKING:
    from modelcache_api.resource import ModelCache
    from modelcache_fetcher import FetchOptions, FetchResult

FETCH_REASONS = (
    Reason.INVALID_SPEC,
    Reason.INVALID_SOURCE,
    Reason.AUTH_FAILED,
    Reason.SECRET_MISSING,
    Reason.NOT_FOUND,
    Reason.NOT_INSTALLED,
    Reason.RATE_LIMITED,
    Reason.UNAVAILABLE,
    Reason.STALLED,
)
"""How planning can fail."""

PUBLISH_REASONS = (
    *FETCH_REASONS,
    Reason.BAD_WEIGHTS,
    Reason.NO_SPACE,
    Reason.NOT_A_VOLUME,
    Reason.NEWER_FORMAT,
    Reason.CHECKSUM_MISMATCH,
    Reason.VOLUME_BUSY,
    Reason.SPACE_HELD_BY_READERS,
)
"""How fetching can fail."""


def fetch_options(arguments: argparse.Namespace, model: "ModelCache") -> "FetchOptions":
    """Where the credentials are.

    Raises:
        CommandError: The spec wants a secret and none was given, or the folder does not exist.
    """
    from modelcache_fetcher import FetchOptions

    folder: Path | None = arguments.secrets
    reference = model.spec.secret_ref
    if reference is not None and folder is None:
        raise CommandError(
            Reason.SECRET_MISSING,
            f"spec.secretRef names the Secret {reference.name}, which is in a cluster; give its keys as files of a "
            "folder here: --secrets DIR",
        )
    if folder is not None and not folder.is_dir():
        raise CommandError(Reason.SECRET_MISSING, f"--secrets {folder}: there is no such folder")
    return FetchOptions(secrets_dir=folder, lock_wait=getattr(arguments, "wait", 0.0))


def fetch(arguments: argparse.Namespace, model: "ModelCache", root: Path, *, verify: bool = False) -> "FetchResult":
    """Fetch what a manifest asks for, with a progress display, and say what came of it.

    With ``verify``, what the volume has is read again first, and what is damaged is fetched anew.
    """
    from modelcache_fetcher import Progress, run_fetch

    name, spec = model.metadata.name, model.spec
    options = replace(fetch_options(arguments, model), verify=verify)
    progress = Progress()
    with ProgressDisplay(progress.snapshot, f"fetch {name}"):
        result = run_fetch(spec, root, name, options=options, progress=progress)
    what = f"{result.files} files, {format_bytes(result.bytes)}"
    how = f"{format_bytes(result.downloaded_bytes)} fetched" if result.downloaded_bytes else "all there already"
    say(f"{name}: {what} of {spec.repo_id} at {result.commit[:12]}, {how}; digest {result.digest}")
    if result.replaced:
        text = f"whoever serves {name} from this volume now serves {spec.repo_id}"
        say(f"note: {name} was {result.replaced} until now; {text}")
    return result
