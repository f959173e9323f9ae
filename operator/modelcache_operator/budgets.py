"""How much may happen at once in the whole cluster: plan and fetch Jobs (also per source host), rollouts."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable

from modelcache_operator import attempts
from modelcache_operator.kube import JOBS, Kube, Object
from modelcache_operator.observed import Slot, is_deleting
from modelcache_operator.resources import names
from modelcache_operator.settings import Settings

COUNT_SECONDS = 5.0
"""How long a count of the cluster's Jobs is good; what is created meanwhile is added to it."""
ROLLOUT_SECONDS = 300.0
"""A rollout that takes longer no longer holds up the others."""

Key = tuple[str, str]


class Budgets:
    """Hands out turns. Whoever asks holds `lock` until the Job is made, so that no two take the same turn."""

    def __init__(self, kube: Kube, settings: Settings) -> None:
        self.lock = asyncio.Lock()
        self._kube = kube
        self._settings = settings
        self._plans = 0
        self._fetches: Counter[str] = Counter()
        self._counted = float("-inf")
        self._rolling: dict[Key, float] = {}

    async def answer(self, asks: Iterable[Slot], key: Key, host: str) -> dict[Slot, bool]:
        """Whether there is room for each of what is asked; a rollout's turn is taken with the answer."""
        answers: dict[Slot, bool] = {}
        for slot in asks:
            if slot == "rollout":
                answers[slot] = self._take_rollout(key)
                continue
            await self._count()
            if slot == "plan":
                answers[slot] = self._plans < self._settings.max_plans
            else:
                answers[slot] = (
                    self._fetches.total() < self._settings.max_fetches
                    and self._fetches[host] < self._settings.max_fetches_per_host
                )
        return answers

    def created(self, job: Object) -> None:
        """A Job was made with a turn."""
        if _component(job) == names.PLAN:
            self._plans += 1
        else:
            self._fetches[_host(job)] += 1

    def settled(self, key: Key, deployment: Object | None) -> None:
        """Give a rollout's turn back once the Deployment has rolled."""
        if key in self._rolling and (deployment is None or _has_rolled(deployment)):
            del self._rolling[key]

    def _take_rollout(self, key: Key) -> bool:
        now = time.monotonic()
        self._rolling = {k: since for k, since in self._rolling.items() if now - since < ROLLOUT_SECONDS}
        if key not in self._rolling and len(self._rolling) >= self._settings.max_rollouts:
            return False
        self._rolling[key] = now
        return True

    async def _count(self) -> None:
        if time.monotonic() - self._counted < COUNT_SECONDS:
            return
        self._plans, self._fetches = 0, Counter()
        for namespace in self._settings.namespaces or (None,):
            labels = f"{names.COMPONENT_LABEL} in ({names.PLAN},{names.FETCH})"
            for job in await self._kube.list(JOBS, namespace, labels=labels):
                if attempts.read(job).state == "running" and not is_deleting(job):
                    self.created(job)
        self._counted = time.monotonic()


def _component(job: Object) -> str:
    return str((job["metadata"].get("labels") or {}).get(names.COMPONENT_LABEL, ""))


def _host(job: Object) -> str:
    return str((job["metadata"].get("annotations") or {}).get(names.HOST_ANNOTATION, ""))


def _has_rolled(deployment: Object) -> bool:
    """As `kubectl rollout status` decides it."""
    status = deployment.get("status") or {}
    wanted = deployment["spec"].get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) >= wanted
        and status.get("replicas", 0) <= status.get("updatedReplicas", 0)
        and status.get("availableReplicas", 0) >= wanted
    )
