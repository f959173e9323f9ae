"""Where connections wait for their next request, and the few threads that take them in turn.

A thread for each connection makes a hundred of them wait for Python's lock in no order, at each of a request's system
calls. Here the kernel keeps the order (epoll hands out what became readable first), and two threads answer.
"""

import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from modelcache_server.http_connection import HttpConnection

_TAKERS = 2
_STUCK_SECONDS = 0.05  # without a turn, though somebody waits for one
_LOOK_SECONDS = 0.25  # between two looks at deadlines
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


@dataclass(frozen=True)
class Guest:
    """A connection, its socket and its client's address."""

    sock: socket.socket
    client: str
    connection: HttpConnection


class _Turn:
    """What one thread does; `aside` while it may take long and others take the turns."""

    aside = False


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
        self._lock = threading.Lock()
        self._waiting: dict[int, Guest] = {}
        self._takers: set[_Turn] = set()
        self._threads: set[threading.Thread] = set()
        self._taken = 0
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name=f"{name}-lobby", daemon=True)
        with self._lock:
            self._fill()
        self._watch.start()

    def enter(self, guest: Guest) -> None:
        """Have a new connection wait for its first request."""
        self._waiting[guest.sock.fileno()] = guest
        self._epoll.register(guest.sock, _READABLE)

    def close(self) -> None:
        """End the threads, once all guests are closed."""
        self._closing.set()
        self._epoll.register(self._end, select.EPOLLIN)  # stays readable: wakes every thread
        self._watch.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._epoll.close()
        os.close(self._end)

    def _fill(self) -> None:
        while len(self._takers) < _TAKERS and not self._closing.is_set():
            turn = _Turn()
            thread = threading.Thread(target=self._take_turns, args=(turn,), name=f"{self._name}-turn", daemon=True)
            thread.start()
            self._takers.add(turn)
            self._threads.add(thread)

    def _step_aside(self, turn: _Turn) -> None:
        if not turn.aside:
            with self._lock:
                turn.aside = True
                self._takers.discard(turn)
                self._fill()

    def _take_turns(self, turn: _Turn) -> None:
        step_aside = functools.partial(self._step_aside, turn)
        while not self._closing.is_set():
            for fd, _ in self._epoll.poll(maxevents=1):
                guest = self._waiting.pop(fd, None)
                if guest is None:
                    continue
                self._taken += 1
                if self._serve(guest, step_aside):
                    self._waiting[fd] = guest
                    self._epoll.modify(fd, _READABLE)
            if turn.aside:
                with self._lock:
                    if len(self._takers) >= _TAKERS:
                        break
                    turn.aside = False
                    self._takers.add(turn)
        with self._lock:
            self._takers.discard(turn)
            self._threads.discard(threading.current_thread())

    def _look_after(self) -> None:
        """Replace threads that are stuck, and end the wait of guests whose time is over."""
        ready = select.poll()
        ready.register(self._epoll, select.POLLIN)
        next_look = 0.0
        while not self._closing.is_set():
            if ready.poll(_LOOK_SECONDS * 1000):
                before = self._taken
                self._closing.wait(_STUCK_SECONDS)
                if self._taken == before and ready.poll(0):
                    with self._lock:
                        for turn in self._takers:
                            turn.aside = True
                        self._takers.clear()
                        self._fill()
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
