"""Small questions to pods over HTTP: a running fetch's progress, and what a server announces. No answer is no harm."""

import asyncio
import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp

from modelcache_operator.resources import names
from modelcache_operator.resources.names import Object

STATUS_PORT = 9091
LONGEST_ANSWER_BYTES = 64 * 1024
NO_ANSWER = ""
"""In place of the digest of a server that did not answer in time: it may announce anything."""


class Pods:
    """Asks pods on their status port; needs no right in the API, only the network.

    Args:
        timeout: Seconds for one question; the cluster's network may drop it silently.
        port: Where pods answer.
    """

    def __init__(self, timeout: float = 1.0, port: int = STATUS_PORT) -> None:
        self._port = port
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def progress(self, pods: Iterable[Object]) -> Mapping[str, Any] | None:
        """What the running fetch among these pods says about its progress; None without an answer."""
        for pod in pods:
            if _component(pod) == names.FETCH and _is_running(pod):
                with contextlib.suppress(TimeoutError):
                    return await self._get(pod, "/progress")
        return None

    async def announced(self, pods: Iterable[Object]) -> frozenset[str] | None:
        """Digests that ready servers announce, NO_ANSWER for who is too slow; None if there is nobody to answer."""
        asked = [pod for pod in pods if _component(pod) == names.SERVER and _is_ready(pod)]
        digests = await asyncio.gather(*map(self._announced_by, asked))
        return frozenset(digest for digest in digests if digest is not None) or None

    async def _announced_by(self, pod: Object) -> str | None:
        try:
            answer = await self._get(pod, "/active")
        except TimeoutError:
            return NO_ANSWER
        return str(answer["digest"]) if answer is not None and answer.get("digest") else None

    async def _get(self, pod: Object, path: str) -> Mapping[str, Any] | None:
        """The answer; None if nobody listens or says something else. Raises TimeoutError."""
        address = str(pod["status"]["podIP"])
        host = f"[{address}]" if ":" in address else address
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        try:
            async with self._session.get(f"http://{host}:{self._port}{path}", allow_redirects=False) as response:
                body = await response.content.read(LONGEST_ANSWER_BYTES)
                decoded = json.loads(body) if response.status == 200 else None
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError):
            return None
        return decoded if isinstance(decoded, dict) else None


def _component(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL, ""))


def _is_running(pod: Object) -> bool:
    status = pod.get("status") or {}
    return (
        status.get("phase") == "Running" and bool(status.get("podIP")) and not pod["metadata"].get("deletionTimestamp")
    )


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return _is_running(pod) and any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
