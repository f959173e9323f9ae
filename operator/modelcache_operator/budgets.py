"""How much may happen at once in the whole cluster: plan and fetch Jobs (also per source host), rollouts."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterable

from modelcache_operator import attempts
from modelcache_operator.clock import parse_time
from modelcache_operator.kube import JOBS, Kube, Object
from modelcache_operator.observed import Slot, is_deleting
from modelcache_operator.resources import names
from modelcache_operator.settings import Settings

COUNT_SECONDS = 5.0
"""How long a count of the cluster's Jobs is good; what is created meanwhile is added to it."""
STUCK_SECONDS = 300.0
"""A Job of which no pod has run for so long holds no turn: it loads nothing, and a few would hold up all others."""
ROLLOUT_SECONDS = 300.0
"""A rollout that takes longer no longer holds up the others."""

Key = tuple[str, str]


class Budgets:
    """Hands out turns. Whoever asks holds `lock` until the Job is made, so that no two take the same turn.

    Who gets none waits in line: a thousand that ask again and again would be a stampede themselves.
    """

    def __init__(self, kube: Kube, settings: Settings) -> None:
        self.lock = asyncio.Lock()
        self._kube = kube
        self._settings = settings
        self._plans = 0
        self._fetches: Counter[str] = Counter()
        self._counted = float("-inf")
        self._running: dict[Key, int] = {}
        self._rolling: dict[Key, float] = {}
        self._waiting: dict[Slot, dict[Key, str]] = {"plan": {}, "fetch": {}, "rollout": {}}

    async def answer(self, asks: Iterable[Slot], key: Key, host: str) -> dict[Slot, bool]:
        """Whether there is room for each of what is asked; a rollout's turn is taken with the answer."""
        answers: dict[Slot, bool] = {}
        for slot in asks:
            if slot == "rollout":
                answers[slot] = self._take_rollout(key)
            else:
                await self._count()
                answers[slot] = self._has_room(slot, host)
            if answers[slot]:
                self._waiting[slot].pop(key, None)
            else:
                self._waiting[slot].setdefault(key, host)
        return answers

    def created(self, job: Object) -> None:
        """A Job was made with a turn."""
        self._add(job)
        key = (job["metadata"]["namespace"], job["metadata"]["labels"][names.NAME_LABEL])
        self._running[key] = self._running.get(key, 0) + 1

    def settled(self, key: Key, jobs: Iterable[Object], deployment: Object | None) -> list[Key]:
        """Take back the turns that a key no longer needs.

        Args:
            key: The ModelCache.
            jobs: Its Jobs as they are; none if it is gone.
            deployment: Its Deployment as it is; None if there is none.

        Returns:
            Who may ask again, as long as they have waited.
        """
        woken: list[Key] = []
        if key in self._rolling and (deployment is None or _has_rolled(deployment)):
            del self._rolling[key]
            woken += self._wake("rollout", None)
        running = [job for job in jobs if _is_running(job)]
        before = self._running.pop(key, 0)
        if running:
            self._running[key] = len(running)
        if len(running) < before:
            self._counted = float("-inf")
            woken += self._wake("plan", None)
            for host in {_host(job) for job in jobs} or {""}:
                woken += self._wake("fetch", host)
        return woken

    def forget(self, key: Key) -> list[Key]:
        """The ModelCache is gone; returns who may ask again."""
        for line in self._waiting.values():
            line.pop(key, None)
        return self.settled(key, [], None)

    def _wake(self, slot: Slot, host: str | None) -> list[Key]:
        """The first in line, and the first of those that wait for the same host: one of them can go on."""
        line = self._waiting[slot]
        first = [*itertools.islice(line, 1), *itertools.islice((k for k, h in line.items() if h == host), 1)]
        for key in first:
            line.pop(key, None)
        return first

    def _has_room(self, slot: Slot, host: str) -> bool:
        if slot == "plan":
            return self._plans < self._settings.max_plans
        return (
            self._fetches.total() < self._settings.max_fetches
            and self._fetches[host] < self._settings.max_fetches_per_host
        )

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
            # finished ones stay for their logs: of many ModelCaches they would be the most
            for job in await self._kube.list(JOBS, namespace, labels=labels, fields="status.successful=0"):
                if _holds_a_turn(job, time.time()):
                    self._add(job)
        self._counted = time.monotonic()

    def _add(self, job: Object) -> None:
        if _component(job) == names.PLAN:
            self._plans += 1
        else:
            self._fetches[_host(job)] += 1


def _is_running(job: Object) -> bool:
    return attempts.read(job).state == "running" and not is_deleting(job)


def _holds_a_turn(job: Object, now: float) -> bool:
    status = job.get("status") or {}
    is_new = now - parse_time(job["metadata"].get("creationTimestamp")) < STUCK_SECONDS
    return _is_running(job) and bool(is_new or status.get("ready") or status.get("failed"))


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
