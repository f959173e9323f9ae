"""How many bytes are on their way to clients at once, and whose turn is next."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from modelcache_server.errors import Reason, RequestError


@dataclass(eq=False)
class _Turn:
    amount: int
    come: threading.Event
    admitted: bool = False


class Admission:
    """A budget of bytes in flight, handed out block by block and in turn between clients.

    A client with a hundred connections gets no more turns than one with a single connection, and holds at most half of
    the budget. Since a turn is one block, reading a terabyte delays nobody by more than a block.
    """

    def __init__(
        self, budget: int, *, observe: Callable[[float], None] = lambda _: None, max_waiting: int = 4096
    ) -> None:
        """Hand out `budget` bytes; `observe` is told how many seconds those waited who had to."""
        self.budget = budget
        self._client_budget = max(budget // 2, 1)
        self._observe = observe
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[_Turn]] = OrderedDict()
        self.in_flight = 0
        self.waiting = 0

    def acquire(self, client: str, amount: int, *, timeout: float) -> None:
        """Take `amount` bytes of the budget for `client`; waits at most `timeout` seconds for its turn.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, when too many wait already or the turn did not come in time.
        """
        with self._lock:
            turn = None if self._take_at_once(client, amount) else self._queue(client, amount)
        if turn is not None:
            start = time.perf_counter()
            try:
                self._wait(client, turn, timeout)
            finally:
                self._observe(time.perf_counter() - start)

    def release(self, client: str, amount: int) -> None:
        """Give back what `acquire` took; the next in line gets it."""
        with self._lock:
            self.in_flight -= amount
            left = self._held[client] - amount
            if left:
                self._held[client] = left
            else:
                del self._held[client]
            if self._queues:
                self._admit_next()

    def _room(self, amount: int) -> bool:
        """One turn is always possible, so that no budget is too small for a block."""
        return not self.in_flight or self.in_flight + amount <= self.budget

    def _entitled(self, client: str, amount: int) -> bool:
        held = self._held.get(client, 0)
        return not held or held + amount <= self._client_budget

    def _take(self, client: str, amount: int) -> None:
        self.in_flight += amount
        self._held[client] = self._held.get(client, 0) + amount

    def _take_at_once(self, client: str, amount: int) -> bool:
        if self._queues or not (self._room(amount) and self._entitled(client, amount)):
            return False
        self._take(client, amount)
        return True

    def _queue(self, client: str, amount: int) -> _Turn:
        if self.waiting >= self._max_waiting:
            raise _overloaded("too many requests wait already")
        turn = _Turn(amount, threading.Event())
        self._queues.setdefault(client, deque()).append(turn)
        self.waiting += 1
        self._admit_next()
        return turn

    def _wait(self, client: str, turn: _Turn, timeout: float) -> None:
        if turn.come.wait(timeout):
            return
        with self._lock:
            if turn.admitted:  # in the last instant
                return
            queue = self._queues[client]
            queue.remove(turn)
            if not queue:
                del self._queues[client]
            self.waiting -= 1
        raise _overloaded(f"no turn came within {timeout:.0f} s")

    def _admit_next(self) -> None:
        """Round robin: each client gets one turn, then goes to the line's end; who holds its share is passed over."""
        progress = True
        while progress and self._queues:
            progress = False
            for client in list(self._queues):
                queue = self._queues[client]
                if not self._entitled(client, queue[0].amount):
                    continue
                if not self._room(queue[0].amount):
                    return  # whose turn it is waits for room: small turns do not overtake a large one for ever
                turn = queue.popleft()
                self.waiting -= 1
                self._take(client, turn.amount)
                turn.admitted = True
                turn.come.set()
                progress = True
                if queue:
                    self._queues.move_to_end(client)
                else:
                    del self._queues[client]


def _overloaded(why: str) -> RequestError:
    return RequestError(
        Reason.RESOURCE_EXHAUSTED, f"The server is busy: {why}. Retry, or raise its replicas.", retry_after=1.0
    )
