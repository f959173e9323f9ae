"""Where connections wait for their next request, and the thread that takes them in turn.

A thread for each connection makes a hundred of them wait for Python's lock in no order, at each of a request's system
calls. Here the kernel keeps the order (epoll hands out what became readable first), and one thread answers: a second
one would only fight it for that lock. Whoever is about to do something that may take long gives its turn to another.
"""

import functools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from modelcache_server.http_connection import HttpConnection

_log = logging.getLogger(__name__)
_AT_ONCE = 64  # guests that one look at the kernel brings
_STUCK_SECONDS = 0.05  # without a turn, though somebody waits for one
_LOOK_SECONDS = 0.25  # between two looks at deadlines
_SPARE_SECONDS = 5.0  # for which a thread without a turn is kept for the next
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


@dataclass(frozen=True)
class Guest:
    """A connection, its socket and its client's address."""

    sock: socket.socket
    client: str
    connection: HttpConnection


class _Turn:
    """The right to take guests; `over` once another thread has it."""

    over = False


class Lobby:
    """Waiting connections of one port."""

    def __init__(self, serve: Callable[[Guest, Callable[[], None]], bool], *, name: str) -> None:
        """Start with nobody.

        Args:
            serve: answers what a guest has sent; False when the guest is closed. It calls its second argument before
                anything that may take long.
            name: of the threads.
        """
        self._serve = serve
        self._name = name
        self._epoll = select.epoll()
        self._end = os.eventfd(1)
        self._waiting: dict[int, Guest] = {}
        self._next: deque[int] = deque()  # those of them whose turn comes next
        self._taken = 0
        self._closing = False
        self._changed = threading.Condition()
        self._turn: _Turn | None = None  # whose thread takes guests; None while that is to be another
        self._spare = 0
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name=f"{name}-lobby", daemon=True)
        with self._changed:
            self._hand_on()
        self._watch.start()

    def enter(self, guest: Guest) -> None:
        """Have a new connection wait for its first request."""
        self._waiting[guest.sock.fileno()] = guest
        self._epoll.register(guest.sock, _READABLE)

    def close(self) -> None:
        """End the threads, once all guests are closed."""
        self._closed.set()
        self._epoll.register(self._end, select.EPOLLIN)  # stays readable: wakes who waits for guests
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            threads = [self._watch, *self._threads]
        for thread in threads:
            thread.join()
        self._epoll.close()
        os.close(self._end)

    def _hand_on(self) -> None:
        """Have another thread take the turns; the one that has them keeps them where no other can be started."""
        if self._spare:
            self._changed.notify()
        else:
            thread = threading.Thread(target=self._run, name=f"{self._name}-turn", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _log.warning("connections wait for each other lane=%s: %s", self._name, error)
                return
            self._threads.add(thread)
        if self._turn is not None:
            self._turn.over = True
            self._turn = None

    def _step_aside(self, turn: _Turn) -> None:
        if not turn.over:
            with self._changed:
                if not turn.over:
                    self._hand_on()

    def _run(self) -> None:
        """Take turns, and wait a while for the next ones."""
        while True:
            with self._changed:
                self._spare += 1
                wanted = self._changed.wait_for(lambda: self._closing or self._turn is None, _SPARE_SECONDS)
                self._spare -= 1
                if self._closing or not wanted:
                    self._threads.discard(threading.current_thread())
                    return
                turn = self._turn = _Turn()
            self._take(turn)

    def _take(self, turn: _Turn) -> None:
        step_aside = functools.partial(self._step_aside, turn)
        while not (turn.over or self._closing):
            try:
                fd = self._next.popleft()
            except IndexError:
                self._next.extend(fd for fd, _ in self._epoll.poll(maxevents=_AT_ONCE))
                continue
            guest = self._waiting.pop(fd, None)
            if guest is None:
                continue
            self._taken += 1
            if self._serve(guest, step_aside):
                self._waiting[fd] = guest
                self._epoll.modify(fd, _READABLE)

    def _look_after(self) -> None:
        """Replace a thread that is stuck, and end the wait of guests whose time is over."""
        ready = select.poll()
        ready.register(self._epoll, select.POLLIN)
        next_look = 0.0
        while not self._closed.is_set():
            if ready.poll(_LOOK_SECONDS * 1000) or self._next:
                before = self._taken
                if self._closed.wait(_STUCK_SECONDS):
                    return
                if self._taken == before and (self._next or ready.poll(0)):
                    with self._changed:
                        on_its_way = self._turn is None and self._threads
                        if not (on_its_way or self._closing):
                            self._hand_on()
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _LOOK_SECONDS
                for guest in list(self._waiting.values()):
                    if guest.connection.deadline < now:
                        shut_reading(guest.sock)  # readable now: a thread takes it, and sees the deadline


def shut_reading(sock: socket.socket) -> None:
    """Wake whoever waits for a request; sending goes on."""
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:
        return  # the other side was first
