"""The thin shell around the pure core: reads live, decides, acts, writes status, and says when to look again."""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from modelcache_api.resource import API_VERSION, KIND, ModelCacheSpec
from modelcache_operator import conditions
from modelcache_operator.actions import Note
from modelcache_operator.budgets import Budgets
from modelcache_operator.clock import format_time
from modelcache_operator.conditions import Condition
from modelcache_operator.errors import ApiError, ApiUnreachable
from modelcache_operator.kube import MODEL_CACHES, RESOURCES, Kube, Object
from modelcache_operator.metrics import Metrics
from modelcache_operator.news import News
from modelcache_operator.observed import Observed, Refusal, is_deleting
from modelcache_operator.reading import Reader
from modelcache_operator.reconcile import Decision, reconcile
from modelcache_operator.resources.effective import effective
from modelcache_operator.resources.jobs import source_host
from modelcache_operator.settings import Settings
from modelcache_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

Key = tuple[str, str]
RECONCILE_SECONDS = 120.0
REFUSED_SECONDS = 30.0
"""What the API server would not take is not tried again sooner: it cannot heal by itself."""
ROUNDS = 4
_GOOD_NEWS = {"True"}


class Controller:
    """Reconciles keys from a queue with a number of workers."""

    def __init__(self, kube: Kube, reader: Reader, settings: Settings, metrics: Metrics) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self.news = News()
        self._kube = kube
        self._reader = reader
        self._settings = settings
        self._metrics = metrics
        self._budgets = Budgets(kube, settings)

    async def work(self) -> None:
        """One worker; runs until it is cancelled."""
        while True:
            key = await self.queue.get()
            began = time.monotonic()
            try:
                async with asyncio.timeout(RECONCILE_SECONDS):  # not wait_for: 3.11's can swallow a cancel
                    again = await self.reconcile(key)
            except Exception as error:  # noqa: BLE001 - whatever it is, the key is tried again and the others go on
                self._failed(key, error)
            else:
                self.queue.forget(key)
                self._metrics.reconciles.labels("ok").inc()
                if again is not None:
                    self.queue.add_after(key, again)
            finally:
                self._metrics.seconds.observe(time.monotonic() - began)
                self.queue.done(key)

    async def reconcile(self, key: Key) -> float | None:
        """Bring one ModelCache nearer to what it should be.

        Returns:
            Seconds until the next look; None if the ModelCache is gone.

        Raises:
            ApiError, ApiUnreachable: Try again later.
        """
        cr = await self._kube.get(MODEL_CACHES, *key)
        if cr is None or is_deleting(cr):  # its children go with it: they have ownerReferences
            self._reader.forget(key)
            self.news.forget(key)
            self._metrics.forget(key)
            self._ask_again(self._budgets.forget(key))
            return None
        try:
            spec = ModelCacheSpec.model_validate(cr["spec"], context={"cluster": True})
        except ValidationError as error:
            self.news.forget(key)
            await self._write(cr, _invalid(cr, error), [])
            return self._resync()
        observed = await self._reader.observe(cr, effective(spec, self._settings.defaults))
        self.news.read(key, observed.objects, with_pods=observed.pods_were_read)
        self._ask_again(self._budgets.settled(key, observed.jobs, observed.deployment))
        decision, is_refused = await self._act(key, observed)
        await self._write(cr, decision.status, decision.notes)
        again = self._resync() if decision.requeue_after is None else decision.requeue_after
        return min(again, REFUSED_SECONDS) if is_refused else again

    async def _act(self, key: Key, observed: Observed) -> tuple[Decision, bool]:
        """Decide and carry out; what is refused goes into a new decision, which may know another way."""
        done: set[tuple[str, str]] = set()
        for _ in range(ROUNDS):
            decision = reconcile(observed, self._settings)
            if decision.asks:
                async with self._budgets.lock:  # until the Job is made: nobody else takes the same turn
                    answers = await self._budgets.answer(decision.asks, key, source_host(observed.spec))
                    observed = replace(observed, slots={**observed.slots, **answers})
                    decision = reconcile(observed, self._settings)
                    refusals = await self._carry_out(decision, done)
            else:
                refusals = await self._carry_out(decision, done)
            if not refusals:
                return decision, bool(observed.refusals)
            observed = replace(observed, refusals={**observed.refusals, **refusals})
        return reconcile(observed, self._settings), True

    async def _carry_out(self, decision: Decision, done: set[tuple[str, str]]) -> dict[tuple[str, str], Refusal]:
        """Do what was not tried yet; returns what the API server would not take."""
        refusals: dict[tuple[str, str], Refusal] = {}
        for obj in decision.applies:
            if _identity(obj) not in done:
                done.add(_identity(obj))
                await self._try(refusals, obj, self._kube.apply(obj))
        for job in decision.creates:
            if _identity(job) in done:
                continue
            done.add(_identity(job))
            if await self._try(refusals, job, self._kube.create(job)):
                self._budgets.created(job)
                log.info("created", extra=_where(job))
        for obj in decision.deletes:
            metadata = obj["metadata"]
            if _identity(obj) in done:
                continue
            done.add(_identity(obj))
            await self._kube.delete(
                RESOURCES[obj["kind"]], metadata["namespace"], metadata["name"], uid=metadata["uid"]
            )
            log.info("deleted", extra=_where(obj))
        return refusals

    @staticmethod
    async def _try(refusals: dict[tuple[str, str], Refusal], obj: Object, call: Awaitable[Object]) -> bool:
        """Make one call; a refusal is noted instead of raised, so that the status can say so."""
        try:
            await call
        except ApiError as error:
            if not error.is_refusal:
                raise
            refusals[_identity(obj)] = Refusal(error.status, error.message)
            log.warning("refused: %s", error, extra=_where(obj))
            return False
        return True

    async def _write(self, cr: Object, status: Mapping[str, Any], notes: Iterable[Note]) -> None:
        """Write the status if it changed, then an Event for each change of a condition and each note."""
        old = cr.get("status") or {}
        metadata = cr["metadata"]
        key = (metadata["namespace"], metadata["name"])
        self._metrics.model_cache(key, status)
        if status == old:
            return
        identity = {name: metadata[name] for name in ("namespace", "name", "resourceVersion")}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": identity, "status": dict(status)}
        await self._kube.apply(body, subresource="status")
        changed = conditions.changes(status["conditions"], old.get("conditions") or [])
        told = [
            Note(c["reason"], f"{c['type']} is {c['status']}: {c['message']}", warning=_is_trouble(c)) for c in changed
        ]
        for note in [*notes, *told]:
            await self._tell(cr, note)

    async def _tell(self, cr: Object, note: Note) -> None:
        """Write an Event; losing one only costs information."""
        metadata = cr["metadata"]
        now = format_time(time.time())
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"namespace": metadata["namespace"], "name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}"},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "type": "Warning" if note.warning else "Normal",
            "reason": note.reason[:128],
            "message": note.message[:1024],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "modelcache-operator"},
            "reportingComponent": "modelcache.io/operator",
            "reportingInstance": self._settings.identity[:128],
        }
        level = logging.WARNING if note.warning else logging.INFO
        log.log(level, note.message, extra={"fields": {"reason": note.reason, **_name(cr)}})
        try:
            await self._kube.create(event)
        except (ApiError, ApiUnreachable) as error:
            log.warning("an Event was not written: %s", error, extra={"fields": _name(cr)})

    def _ask_again(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.queue.add(key)

    def _failed(self, key: Key, error: Exception) -> None:
        fields = {"namespace": key[0], "name": key[1]}
        if isinstance(error, ApiError) and error.is_conflict:
            self._metrics.reconciles.labels("conflict").inc()
            delay = self.queue.retry(key)
            log.info("read again in %.1f s: %s", delay, error, extra={"fields": fields})
            return
        self._metrics.reconciles.labels("error").inc()
        delay = self.queue.retry(key, at_least=error.retry_after if isinstance(error, ApiError) else 0.0)
        expected = isinstance(error, ApiError | ApiUnreachable | TimeoutError)
        log.log(
            logging.WARNING if expected else logging.ERROR,
            "tried again in %.1f s: %s",
            delay,
            error or type(error).__name__,
            exc_info=None if expected else error,
            extra={"fields": fields},
        )

    def _resync(self) -> float:
        return self._settings.resync_seconds * random.uniform(0.9, 1.1)  # noqa: S311 - jitter


def _invalid(cr: Object, error: ValidationError) -> dict[str, Any]:
    """Status of a stored spec that today's rules refuse: nothing is done, nothing is undone."""
    problems = "; ".join(
        f"spec.{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    )
    old = cr.get("status") or {}
    before = {c["type"]: c for c in old.get("conditions") or []}
    wanted = []
    for type_ in conditions.ORDER:
        kept = before.get(type_)
        if type_ in {conditions.RESOLVED, conditions.UP_TO_DATE} or kept is None:
            wanted.append(Condition(type_, "False", "InvalidSpec", f"The spec is refused: {problems}"))
        else:
            wanted.append(Condition(type_, kept["status"], kept["reason"], kept["message"]))
    generation = int(cr["metadata"].get("generation") or 0)
    merged = conditions.merge(wanted, old.get("conditions") or [], generation=generation, now=format_time(time.time()))
    return {**old, "observedGeneration": generation, "conditions": merged}


def _is_trouble(condition: Mapping[str, Any]) -> bool:
    """Whether a change of a condition deserves a Warning: not while things simply take their time."""
    waiting = {"Fetching", "Planning", "Starting", "WaitingForFetch", "NotResolved", "CreatingVolume", "MountOnly"}
    waiting |= {"Suspended", "WaitingForTurn", "GrowingVolume", "Announcing", "RollingOut", "Waiting"}
    return condition["status"] not in _GOOD_NEWS and condition["reason"] not in waiting


def _identity(obj: Object) -> tuple[str, str]:
    return obj["kind"], obj["metadata"]["name"]


def _name(cr: Object) -> dict[str, str]:
    return {"namespace": cr["metadata"]["namespace"], "name": cr["metadata"]["name"]}


def _where(obj: Object) -> dict[str, dict[str, str]]:
    return {
        "fields": {"kind": obj["kind"], "object": obj["metadata"]["name"], "namespace": obj["metadata"]["namespace"]}
    }
