"""The termination message of plan and fetch containers: JSON of at most 4 KiB, the interface to the operator. Pure.

Kubernetes cuts what is longer (https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/),
which would leave broken JSON: so long texts and lists are shortened here.
"""

import json
from dataclasses import asdict
from typing import Any

from modelcache_api.reasons import REASONS
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.fetch import FetchResult
from modelcache_fetcher.plan import Plan

MAX_BYTES = 4096
_MAX_TEXT = 1500
_LISTED = 20


def plan_message(plan: Plan) -> str:
    """What the plan found: commit, number of files, bytes, the largest files by name."""
    largest = sorted(plan.files, key=lambda file: -file.size)[:_LISTED]
    message: dict[str, Any] = {
        "result": "planned",
        "repoId": plan.repo_id,
        "requested": plan.requested,
        "commit": plan.commit,
        "files": len(plan.files),
        "bytes": plan.total_bytes,
        "skippedFiles": len(plan.skipped),
        "skippedBytes": sum(file.size for file in plan.skipped),
        "largest": [{"path": file.path, "size": file.size} for file in largest],
    }
    while len(text := json.dumps(message)) > MAX_BYTES and message["largest"]:
        message["largest"].pop()
    return text


def result_message(result: FetchResult) -> str:
    """What was published."""
    names = {"downloaded_bytes": "downloadedBytes"}
    return json.dumps({"result": "fetched", **{names.get(key, key): value for key, value in asdict(result).items()}})


def failure_message(error: FetchError) -> str:
    """Why it failed: reason, sentence, file, whether a retry is useless."""
    message: dict[str, Any] = {
        "result": "failed",
        "reason": error.reason.value,
        "permanent": REASONS[error.reason].permanent,
        "message": _shorten(str(error)),
    }
    if error.path is not None:
        message["path"] = _shorten(error.path)
    if error.retry_after is not None:
        message["retryAfterSeconds"] = round(error.retry_after)
    # A character outside of ASCII takes up to 12 bytes in JSON.
    while len(text := json.dumps(message)) > MAX_BYTES:
        message = {
            key: value[: len(value) // 2] + "…" if isinstance(value, str) and len(value) > 100 else value
            for key, value in message.items()
        }
    return text


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
