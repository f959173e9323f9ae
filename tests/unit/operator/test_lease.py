import asyncio
import copy

import pytest

from modelcache_operator.errors import ApiError, ApiUnreachable, LeadershipLost
from modelcache_operator.lease import Election, LeaseTimes

TIMES = LeaseTimes(duration=1.0, renew_deadline=0.2, retry=0.02)


class LeaseStore:
    """The API server's part of the bargain: optimistic locking on one Lease."""

    def __init__(self):
        self.lease = None
        self.version = 0
        self.down = False

    async def get(self, resource, namespace, name):
        await self._answer()
        return copy.deepcopy(self.lease)

    async def create(self, obj):
        await self._answer()
        if self.lease is not None:
            raise ApiError(409, "AlreadyExists", "taken")
        return self._store(obj)

    async def update(self, obj):
        await self._answer()
        if obj["metadata"]["resourceVersion"] != str(self.version):
            raise ApiError(409, "Conflict", "stale")
        return self._store(obj)

    async def _answer(self):
        await asyncio.sleep(0)
        if self.down:
            raise ApiUnreachable("down")

    def _store(self, obj):
        self.version += 1
        self.lease = copy.deepcopy(obj)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return self.lease


def election(store, identity):
    return Election(store, "ns", "lease", identity, TIMES)


def run(scenario):
    async def bounded():
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


def test_of_many_that_start_at_once_one_leads():
    async def scenario():
        store = LeaseStore()
        tasks = [asyncio.create_task(election(store, f"r{n}").acquire()) for n in range(5)]
        await asyncio.wait(tasks, timeout=0.3)
        assert sum(task.done() for task in tasks) == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_a_released_lease_is_taken_at_once_and_a_silent_one_after_its_duration():
    async def scenario():
        loop = asyncio.get_running_loop()
        store = LeaseStore()
        first = election(store, "first")
        await first.acquire()
        await first.release()
        began = loop.time()
        await election(store, "second").acquire()
        assert loop.time() - began < 0.5
        began = loop.time()
        await election(store, "third").acquire()  # "second" never renews
        assert 0.9 < loop.time() - began < 3
        assert store.lease["spec"]["leaseTransitions"] == 3

    run(scenario)


def test_who_waits_says_once_for_whom(caplog):
    """The log of an operator that does nothing for a while must not be empty."""

    async def scenario():
        store = LeaseStore()
        await election(store, "first").acquire()
        await election(store, "second").acquire()

    with caplog.at_level("INFO"):
        run(scenario)
    assert [record.getMessage() for record in caplog.records] == ["standing by: lease ns/lease is held by first"]


def test_a_leader_that_cannot_renew_stops_before_the_lease_can_be_taken():
    async def scenario():
        loop = asyncio.get_running_loop()
        store = LeaseStore()
        leader = election(store, "leader")
        await leader.acquire()
        holding = asyncio.create_task(leader.hold())
        await asyncio.sleep(0.1)
        store.down = True
        began = loop.time()
        with pytest.raises(LeadershipLost, match="could not be renewed"):
            await holding
        assert loop.time() - began < TIMES.duration

    run(scenario)


def test_a_leader_outlives_an_outage_shorter_than_its_deadline():
    async def scenario():
        store = LeaseStore()
        leader = election(store, "leader")
        await leader.acquire()
        holding = asyncio.create_task(leader.hold())
        version = store.version
        store.down = True
        await asyncio.sleep(0.08)
        store.down = False
        while store.version < version + 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not holding.done()
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)

    run(scenario)


def test_a_leader_whose_lease_another_holds_stops_at_once():
    async def scenario():
        store = LeaseStore()
        leader = election(store, "leader")
        await leader.acquire()
        usurper = copy.deepcopy(store.lease)
        usurper["spec"]["holderIdentity"] = "usurper"
        await store.update(usurper)
        with pytest.raises(LeadershipLost, match="another replica"):
            await leader.hold()

    run(scenario)


def test_releasing_without_a_server_does_no_harm():
    async def scenario():
        store = LeaseStore()
        leader = election(store, "leader")
        await leader.acquire()
        store.down = True
        await leader.release()
        assert store.lease["spec"]["holderIdentity"] == "leader"

    run(scenario)
