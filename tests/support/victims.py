"""What processes that are about to be killed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelcache_fetcher import run_fetch
from support.fetching import options, spec


def fetch_model(endpoint: str, volume: str, fields: dict[str, Any]) -> None:
    """Fetch org/name, waiting for the lock of a process that is still ending."""
    run_fetch(spec("org/name", endpoint=endpoint, **fields), Path(volume), "model", options=options(lock_wait=5.0))
