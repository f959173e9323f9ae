import asyncio
import random
from collections import Counter

import pytest

from modelcache_operator.workqueue import WorkQueue


def test_a_key_added_many_times_while_it_waits_runs_once():
    async def scenario():
        queue = WorkQueue()
        for _ in range(10):
            queue.add("a")
        assert await queue.get() == "a"
        assert len(queue) == 0

    asyncio.run(scenario())


def test_a_key_added_while_it_is_worked_on_runs_again_after_and_not_beside():
    async def scenario():
        queue = WorkQueue()
        queue.add("a")
        key = await queue.get()
        queue.add("a")
        assert len(queue) == 0
        queue.done(key)
        assert await queue.get() == "a"

    asyncio.run(scenario())


def test_the_earlier_of_two_delayed_wake_ups_counts():
    async def scenario():
        queue = WorkQueue()
        queue.add_after("a", 60)
        queue.add_after("a", 0.01)
        queue.add_after("a", 60)
        async with asyncio.timeout(5):
            assert await queue.get() == "a"
        queue.close()

    asyncio.run(scenario())


def test_back_off_doubles_up_to_the_cap_and_starts_anew_after_a_success():
    async def scenario():
        queue = WorkQueue(base=1.0, cap=8.0)
        delays = [queue.retry("a") for _ in range(6)]
        assert [round(delay / expected, 0) for delay, expected in zip(delays, [1, 2, 4, 8, 8, 8], strict=True)] == [
            1
        ] * 6
        queue.forget("a")
        assert queue.retry("a") <= 1.2
        assert queue.retry("a", at_least=30) == 30
        queue.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [1, 2])
def test_under_stress_no_wake_up_is_lost_and_no_key_overlaps(seed):
    """20,000 adds of 200 keys against 16 workers of which each tenth run fails."""
    rng = random.Random(seed)

    async def scenario():
        queue = WorkQueue(base=0.001, cap=0.01)
        wanted: Counter[int] = Counter()
        seen: Counter[int] = Counter()
        running: set[int] = set()
        overlaps = 0

        async def worker():
            nonlocal overlaps
            while True:
                key = await queue.get()
                overlaps += key in running
                running.add(key)
                version = wanted[key]
                await asyncio.sleep(0)
                running.discard(key)
                if rng.random() < 0.1:
                    queue.retry(key)
                else:
                    seen[key] = version
                    queue.forget(key)
                queue.done(key)

        workers = [asyncio.create_task(worker()) for _ in range(16)]
        for n in range(20_000):
            key = rng.randrange(200)
            wanted[key] += 1
            queue.add(key)
            if n % 50 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while seen != wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        queue.close()
        assert overlaps == 0

    asyncio.run(scenario())


def test_whoever_wants_to_know_when_a_key_is_done_is_told_then():
    async def scenario():
        queue = WorkQueue()
        await queue.until_done("a")
        queue.add("a")
        key = await queue.get()
        waiting = asyncio.create_task(queue.until_done("a"))
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.done(key)
        await waiting

    asyncio.run(scenario())


def test_what_waits_to_run_is_not_run_once_more_for_a_later_time():
    async def scenario():
        queue = WorkQueue()
        queue.add("a")
        queue.add_after("a", 0.01)
        queue.done(await queue.get())
        await asyncio.sleep(0.03)
        assert len(queue) == 0

    asyncio.run(scenario())
