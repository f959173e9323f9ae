"""Fetches a model's files from where they live into a ModelCache volume: planned, verified, resumable.

``make_plan`` says what would be fetched, ``run_fetch`` fetches and publishes it. The Jobs' program is
``modelcache-fetch`` (``__main__``). Sources (``sources``) list, authenticate and sign; one range downloader
(``download``) moves all bytes.
"""

from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.fetch import FetchOptions, FetchResult, make_plan, run_fetch
from modelcache_fetcher.plan import Plan, PlannedFile, SkippedFile
from modelcache_fetcher.progress import Progress

__all__ = [
    "FetchError",
    "FetchOptions",
    "FetchResult",
    "Plan",
    "PlannedFile",
    "Progress",
    "SkippedFile",
    "make_plan",
    "run_fetch",
]
