"""Leader election over a coordination.k8s.io Lease.

kubernetes.aio's LeaseLock cannot create a Lease (37.0.1), writes local time as UTC and lets connection errors escape.
The rule of safety: a leader that could not renew for `renew_deadline` seconds stops before any other replica may take
over, which they do `duration` seconds after they last saw the Lease change, by their own monotonic clocks.
"""

import asyncio
import datetime as dt
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from modelcache_operator.errors import ApiError, ApiUnreachable, LeadershipLost
from modelcache_operator.kube import LEASES, Object, Resource

log = logging.getLogger(__name__)


class LeaseApi(Protocol):
    """The calls of `Kube` that an election needs."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """Read one object."""

    async def create(self, obj: Object) -> Object:
        """Create it; 409 if the name is taken."""

    async def update(self, obj: Object) -> Object:
        """Replace it; 409 if it changed since it was read."""


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds, as client-go's defaults have them."""

    duration: float = 15.0
    renew_deadline: float = 10.0
    retry: float = 2.0


class Election:
    """One replica's view of the Lease.

    Attributes:
        identity: Unique for this process (pod name and a random part), so that a restarted pod waits like any other.
    """

    def __init__(
        self, api: LeaseApi, namespace: str, name: str, identity: str, times: LeaseTimes | None = None
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self.identity = identity
        self._times = times or LeaseTimes()
        self._seen: tuple[Any, ...] = ()
        self._seen_at = 0.0

    async def acquire(self) -> None:
        """Wait until this replica leads."""
        holder = None
        while await self._attempt() != "held":
            if self._seen and self._seen[0] != holder:
                holder = self._seen[0]
                log.info("standing by: lease %s/%s is held by %s", self._namespace, self._name, holder)
            await asyncio.sleep(self._times.retry * random.uniform(1.0, 1.2))  # noqa: S311 - jitter

    async def hold(self) -> None:
        """Renew for as long as it works.

        Raises:
            LeadershipLost: The Lease is another's, or could not be renewed within the deadline.
        """
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            await asyncio.sleep(self._times.retry)
            deadline = renewed + self._times.renew_deadline
            try:
                async with asyncio.timeout_at(deadline):
                    match await self._attempt():
                        case "held":
                            renewed = loop.time()
                            continue
                        case "taken":
                            raise LeadershipLost(f"lease {self._namespace}/{self._name} was taken by another replica")
            except TimeoutError:
                pass
            if loop.time() >= deadline:
                raise LeadershipLost(
                    f"lease {self._namespace}/{self._name} could not be renewed for {self._times.renew_deadline:g} s"
                )

    async def release(self) -> None:
        """Give the Lease up so that a standby leads within its retry period; errors only cost it the full duration."""
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name)
            if lease is not None and lease["spec"].get("holderIdentity") == self.identity:
                lease["spec"]["holderIdentity"] = ""
                await self._api.update(lease)
        except (ApiError, ApiUnreachable) as error:
            log.warning("the lease was not released: %s", error)

    async def _attempt(self) -> Literal["held", "taken", "failed"]:
        """Take or renew the Lease if that is allowed now; ``failed`` says nothing about who holds it."""
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name)
            if lease is None:
                metadata = {"namespace": self._namespace, "name": self._name}
                lease = {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata}
                self._claim(lease)
                await self._api.create(lease)
            elif self._is_taken(lease.get("spec") or {}):
                return "taken"
            else:
                self._claim(lease)
                await self._api.update(lease)
        except (ApiError, ApiUnreachable) as error:
            log.warning("the lease could not be read or written: %s", error)
            return "failed"
        return "held"

    def _is_taken(self, spec: Mapping[str, Any]) -> bool:
        """Whether another replica holds the Lease, by our clock since we last saw it change."""
        now = asyncio.get_running_loop().time()
        record = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if record != self._seen:
            self._seen, self._seen_at = record, now
        if (spec.get("holderIdentity") or "") in {"", self.identity}:
            return False
        return now < self._seen_at + float(spec.get("leaseDurationSeconds") or self._times.duration)

    def _claim(self, lease: Object) -> None:
        """Write ourselves into the Lease that is about to be sent."""
        spec = lease.setdefault("spec", {})
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if spec.get("holderIdentity") != self.identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self.identity,
            "renewTime": now,
            "leaseDurationSeconds": int(self._times.duration),
        }
