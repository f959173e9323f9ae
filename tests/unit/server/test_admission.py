import threading

import pytest

from modelcache_server.admission import Admission
from modelcache_server.errors import Reason, RequestError
from support.server_volume import wait_until


def queued(admission: Admission, client: str, amount: int, done: list[str]) -> threading.Thread:
    """A thread that waits for its turn; returns once it does."""

    def work() -> None:
        admission.acquire(client, amount, timeout=10)
        done.append(client)

    before = admission.waiting
    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: admission.waiting > before, "does not queue")
    return thread


def test_the_budget_is_never_exceeded():
    admission = Admission(10)
    for client in ("a", "b"):
        admission.acquire(client, 5, timeout=0)
    assert admission.in_flight == 10
    with pytest.raises(RequestError) as caught:
        admission.acquire("c", 1, timeout=0.01)
    assert caught.value.reason is Reason.RESOURCE_EXHAUSTED
    assert caught.value.retry_after
    admission.release("a", 5)
    admission.acquire("c", 1, timeout=0)
    assert admission.in_flight == 6
    assert admission.waiting == 0


def test_one_client_gets_at_most_half():
    admission = Admission(10)
    admission.acquire("greedy", 5, timeout=0)
    with pytest.raises(RequestError):
        admission.acquire("greedy", 1, timeout=0.01)
    admission.acquire("modest", 5, timeout=0)


def test_turns_go_round_between_clients_however_many_connections_one_has():
    admission = Admission(2)
    admission.acquire("holder", 1, timeout=0)
    admission.acquire("other", 1, timeout=0)
    done: list[str] = []
    threads = [queued(admission, "greedy", 1, done) for _ in range(5)]
    threads.append(queued(admission, "modest", 1, done))
    for number, held in enumerate(("holder", "other"), start=1):
        admission.release(held, 1)
        wait_until(lambda number=number: len(done) == number, "nobody's turn came")
    assert sorted(done) == ["greedy", "modest"]
    while len(done) < 6:
        count = len(done)
        admission.release(done[-1] if done[-1] == "greedy" else "greedy", 1)
        wait_until(lambda count=count: len(done) > count, "nobody's turn came")
    for thread in threads:
        thread.join()


def test_a_large_turn_is_not_overtaken_for_ever():
    admission = Admission(10)
    admission.acquire("a", 5, timeout=0)
    admission.acquire("b", 5, timeout=0)
    done: list[str] = []
    large = queued(admission, "large", 10, done)
    small = queued(admission, "small", 1, done)
    admission.release("a", 5)
    assert done == []  # there would be room for the small one
    admission.release("b", 5)
    wait_until(lambda: "large" in done, "the large turn never came")
    admission.release("large", 10)
    large.join()
    small.join()
    assert done == ["large", "small"]


def test_too_many_waiting_are_turned_away_at_once():
    admission = Admission(1, max_waiting=1)
    admission.acquire("a", 1, timeout=0)
    done: list[str] = []
    thread = queued(admission, "b", 1, done)
    with pytest.raises(RequestError):
        admission.acquire("c", 1, timeout=10)
    admission.release("a", 1)
    thread.join()


def test_a_block_larger_than_the_budget_still_gets_its_turn():
    admission = Admission(1)
    admission.acquire("a", 4, timeout=0)
    admission.release("a", 4)
    assert admission.in_flight == 0
