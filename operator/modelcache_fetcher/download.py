"""The one downloader: moves the bytes of all sources, several files and ranges at a time, resumable after kill -9.

Receivers (threads) fetch ranges of at most 16 MiB and write them where they belong, in pieces of up to 1 MiB, each
noted in the file's log with its CRC. Hashers (threads) follow each file in order behind the written bytes, feed them to
every checksum and the tensor index in one pass, check each piece's CRC, and drop the pages that are done. So memory is
bounded by the window between the two, and what a killed run has written is hashed again, not fetched again.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import crc32c

from modelcache_api.reasons import Reason
from modelcache_fetcher import pagecache
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.pieces import PIECE_BYTES, Piece
from modelcache_fetcher.plan import SourceFile
from modelcache_fetcher.progress import Progress
from modelcache_fetcher.requests import Requester, RetryError
from modelcache_fetcher.retry import Limits, backoff_seconds
from modelcache_fetcher.transfer import ContentReader, Received, Transfer, range_bytes
from modelcache_fetcher.transport import Body, TransportError
from modelcache_volume import BadWeights, space_errors

WINDOW_BYTES = 64 * 2**20
"""How far written bytes may be ahead of the hashed ones, over all files, before no further range is begun."""
FLUSH_SECONDS = 0.05
"""Received bytes are written and noted after so long even if the piece is not full: what a kill can lose."""
_RELEASE_BYTES = 8 * 2**20
_HASH_TURN = 32
"""Pieces of one file that a hasher takes before it looks at other files."""


class Downloader:
    """Downloads files of one revision; used once.

    Args:
        requester: Opens ranges.
        on_complete: Called, from several threads, with each complete and verified file and its partial file's path.
        limits: Retries and timeouts.
        concurrency: Receivers.
        progress: Counts bytes and files.
        deadline: ``time.monotonic()`` after which the fetch fails; None: none.
    """

    def __init__(
        self,
        requester: Requester,
        *,
        on_complete: Callable[[Received, Path], None],
        limits: Limits,
        concurrency: int,
        progress: Progress,
        deadline: float | None,
    ) -> None:
        self._requester = requester
        self._on_complete = on_complete
        self._limits = limits
        self._concurrency = concurrency
        self._progress = progress
        self._deadline = deadline
        self._lock = threading.Lock()
        # One condition for each who waits: to wake everybody for every piece costs more than to receive it.
        self._ranges_changed = threading.Condition(self._lock)
        self._pieces_changed = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._waiting: deque[Transfer] = deque()
        self._open: list[Transfer] = []
        self._to_hash: deque[Transfer] = deque()
        self._unfinished = 0
        self._ahead = 0
        self._full = False
        self._executor = ThreadPoolExecutor(max_workers=_hashers(), thread_name_prefix="hash")
        self._failure: BaseException | None = None
        self._stopped = False
        self._hold_until = 0.0
        self._rate_limited_seconds = 0.0

    def run(self, files: Sequence[tuple[SourceFile, Path]]) -> None:
        """Bring all files, given with the paths of their partial files; returns when all are complete.

        Raises:
            FetchError: One failed for good.
            SourceChangedError: One is no longer what was planned.
            NoSpace: The volume is full.
        """
        # Large files first, so that the end is not one connection's.
        ordered = sorted(files, key=lambda each: (-each[0].size, each[0].path))
        step = range_bytes(sum(file.size for file, _ in files), self._concurrency)
        self._waiting.extend(Transfer(file, part, step) for file, part in ordered)
        self._unfinished = len(self._waiting)
        receivers = min(self._concurrency, max(1, self._unfinished * 64))
        workers = [threading.Thread(target=self._guard, args=(self._receive_ranges,)) for _ in range(receivers)]
        workers += [threading.Thread(target=self._guard, args=(self._hash_files,)) for _ in range(_hashers())]
        try:
            for worker in workers:
                worker.start()
            with self._lock:
                while self._unfinished and self._failure is None:
                    self._ended.wait(0.5)
        finally:
            with self._lock:
                self._stop()
            self._requester.transport.close()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            self._executor.shutdown()
            for transfer in self._open:
                transfer.close()
        if self._failure is not None:
            raise self._failure

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that called run
            with self._lock:
                if self._failure is None and not self._stopped:
                    self._failure = error
                self._stop()

    def _stop(self) -> None:
        """End all threads; the lock is held."""
        self._stopped = True
        for condition in (self._ranges_changed, self._pieces_changed, self._ended):
            condition.notify_all()

    # Receivers

    def _receive_ranges(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        while (taken := self._take_range()) is not None:
            transfer, start, end = taken
            try:
                if transfer.fd < 0:
                    self._begin(transfer)
                if transfer.file.size <= PIECE_BYTES:
                    self._receive_small(transfer, buffer)
                else:
                    self._fetch(transfer, start, end, buffer, whole=False)
            finally:
                self._leave(transfer)

    def _take_range(self) -> tuple[Transfer, int, int] | None:
        """The next range to fetch; waits until there is one, None when there will be none."""
        while True:
            with self._lock:
                if self._stopped or not self._unfinished:
                    return None
                transfer = self._choose()
                if transfer is None:
                    self._ranges_changed.wait(0.5)
                    continue
                transfer.active += 1
                if not transfer.pending:
                    return transfer, 0, 0
                start, end = transfer.pending.pop(0)
                if transfer.sequential:
                    end = transfer.file.size
                    transfer.pending.clear()
                return transfer, start, end

    def _choose(self) -> Transfer | None:
        """Spread over files, so that hashing runs in parallel; what a hasher waits for may always be taken."""
        ready = [each for each in self._open if each.pending and not each.starting_over]
        room = not self._full
        ready = [each for each in ready if room or each.pending[0][0] <= each.frontier + PIECE_BYTES]
        if self._waiting and room and (not ready or len(self._open) < min(4, self._concurrency)):
            transfer = self._waiting.popleft()
            self._open.append(transfer)
            return transfer
        return min(ready, key=lambda each: each.active) if ready else None

    def _begin(self, transfer: Transfer) -> None:
        """Learn what the source says about the file, and find what an earlier run has left of it."""
        patience = _Patience()
        while True:
            self._wait_for_turn()
            try:
                self._requester.examine(transfer)
                break
            except RetryError as error:
                self._endure(transfer, patience, error)
        if transfer.file.size <= PIECE_BYTES:
            return
        with space_errors(transfer.part.parent, f"storing {transfer.file.path}", transfer.file.size):
            transfer.open()
        self._progress.found(transfer.pieces.total)
        with self._lock:
            self._offer(transfer)
            self._ranges_changed.notify_all()

    def _leave(self, transfer: Transfer) -> None:
        with self._lock:
            transfer.active -= 1
            self._reset_if_due(transfer)

    def _receive_small(self, transfer: Transfer, buffer: memoryview) -> None:
        """Fetch a file that fits the buffer, whole, and hash it from there."""
        for attempt in range(2):
            size = transfer.file.size
            self._fetch(transfer, 0, size, buffer, whole=True)
            with space_errors(transfer.part.parent, f"storing {transfer.file.path}", size):
                fd = os.open(transfer.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                with space_errors(transfer.part.parent, f"storing {transfer.file.path}", size):
                    _write_all(fd, buffer[:size], 0)
                self._progress.received(size)
                received, problem = self._finish(transfer, fd, buffer[:size], last=attempt == 1)
            finally:
                os.close(fd)
            if received is not None:
                self._completed(transfer, received)
                return
            self._progress.found(-size)
            if attempt == 1:
                raise _mismatch(transfer, problem)

    def _finish(self, transfer: Transfer, fd: int, content: memoryview, *, last: bool) -> tuple[Received | None, str]:
        reader = ContentReader(transfer.file)
        try:
            reader.update(content)
            return reader.finish(fd)
        except BadWeights as error:
            if last:
                raise FetchError(Reason.BAD_WEIGHTS, str(error), path=transfer.file.path) from None
            return None, str(error)

    def _fetch(self, transfer: Transfer, start: int, end: int, buffer: memoryview, *, whole: bool) -> None:
        """Bring [start, end), over as many requests as it takes.

        Args:
            transfer: The file.
            start: First byte.
            end: After the last byte.
            buffer: Receives; a whole file stays in it.
            whole: Keep the bytes in the buffer instead of writing them piece by piece.
        """
        position, patience = start, _Patience()
        while position < end and not transfer.starting_over:
            self._wait_for_turn()
            before = position
            position, failure = self._request(transfer, position, end, buffer, whole=whole)
            if position > before:
                patience = _Patience()
            if failure is not None:
                self._check()
                self._endure(transfer, patience, failure)

    def _request(
        self, transfer: Transfer, position: int, end: int, buffer: memoryview, *, whole: bool
    ) -> tuple[int, RetryError | None]:
        """One request from ``position`` on; returns how far it came, and why not to the end."""
        try:
            body = self._requester.open(transfer, position, end)
        except RetryError as error:
            return position, error
        try:
            while position < end and not transfer.starting_over:
                room = buffer[position:end] if whole else buffer[: end - position]
                count, broken = _fill(body, room)
                if count and not whole:
                    self._store(transfer, position, buffer[:count])
                position += count
                if broken is not None:
                    silent = broken.silent_seconds
                    return position, RetryError(Reason.UNAVAILABLE, str(broken), silent_seconds=silent)
                self._check()
        finally:
            body.close()
        return position, None

    def _endure(self, transfer: Transfer, patience: "_Patience", failure: RetryError) -> None:
        """Wait before the next attempt, or raise when there is to be none."""
        name = transfer.file.path
        if failure.refused:
            patience.refusals += 1
            if patience.refusals > 1:
                raise _refused(transfer, failure)
            self._requester.renew(transfer)
            return
        if failure.reason is Reason.RATE_LIMITED:
            self._hold(transfer, failure)
            return
        patience.silent_seconds += failure.silent_seconds
        if patience.silent_seconds >= self._limits.stall_timeout:
            text = (
                f"No byte of {name} came for {patience.silent_seconds:.0f} s ({failure}); the fetch can be continued."
            )
            raise FetchError(Reason.STALLED, text, path=name)
        patience.failures += 1
        if patience.failures >= self._limits.attempts:
            text = f"{name} could not be fetched: {failure}; given up after {patience.failures} attempts."
            raise FetchError(failure.reason, text, path=name)
        wait = failure.wait if failure.wait is not None else backoff_seconds(self._limits, patience.failures)
        if wait > self._limits.rate_limit_wait:
            text = f"{name} could not be fetched: {failure}; the source asks to wait {wait:.0f} s, which is too long."
            raise FetchError(failure.reason, text, path=name, retry_after=wait)
        self._pause(wait, failure)

    def _store(self, transfer: Transfer, offset: int, data: memoryview) -> None:
        """Write received bytes, note them, and let the hashers know."""
        piece = Piece(offset, len(data), crc32c.crc32c(data))
        with space_errors(transfer.part.parent, f"storing {transfer.file.path}", transfer.file.size):
            _write_all(transfer.fd, data, offset)
            transfer.log.append(piece)
        pagecache.start_writeback(transfer.fd, offset, len(data))
        self._progress.received(len(data))
        with self._lock:
            transfer.pieces.add(piece)
            self._ahead += piece.length
            self._full = self._full or self._ahead >= WINDOW_BYTES
            self._offer(transfer)

    def _hold(self, transfer: Transfer, failure: RetryError) -> None:
        """All receivers wait when the source says that there are too many requests."""
        # A server that says 0 and goes on refusing must not be asked without a pause.
        wait = self._limits.backoff_cap if failure.wait is None else max(failure.wait, self._limits.backoff)
        with self._lock:
            until = time.monotonic() + wait
            self._rate_limited_seconds += max(0.0, until - max(self._hold_until, time.monotonic()))
            total = self._rate_limited_seconds
            late = self._deadline is not None and until > self._deadline
            if total > self._limits.rate_limit_wait or late:
                text = f"{failure}, and waiting {wait:.0f} s more would take too long; use a token, or fetch later."
                raise FetchError(Reason.RATE_LIMITED, text, path=transfer.file.path, retry_after=wait)
            self._hold_until = max(self._hold_until, until)

    def _wait_for_turn(self) -> None:
        while (seconds := self._hold_until - time.monotonic()) > 0:
            self._sleep(seconds)
        self._check()

    def _pause(self, seconds: float, failure: RetryError) -> None:
        until = time.monotonic() + seconds
        if self._deadline is not None and until > self._deadline:
            raise FetchError(failure.reason, f"{failure}; the deadline leaves no time for another attempt.")
        while (left := until - time.monotonic()) > 0:
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        with self._lock:
            if not self._stopped:
                self._ended.wait(seconds)
        self._check()

    def _check(self) -> None:
        if self._stopped:
            raise _StoppedError
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise FetchError(
                Reason.UNAVAILABLE,
                "The fetch was not done when its deadline (activeDeadlineSeconds) came; it can be continued.",
            )

    # Hashers

    def _hash_files(self) -> None:
        # One is hashed while the next is read.
        buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(2)]
        while (transfer := self._take_to_hash()) is not None:
            for turn in range(_HASH_TURN):
                if not self._hash_piece(transfer, buffers[turn % 2]):
                    break
            transfer.reader.wait()
            complete = transfer.frontier == transfer.file.size and not transfer.starting_over
            if complete:
                self._complete(transfer)
            with self._lock:
                transfer.being_hashed = False
                if not transfer.done:
                    self._offer(transfer)
                    self._reset_if_due(transfer)

    def _take_to_hash(self) -> Transfer | None:
        with self._lock:
            while True:
                if self._stopped or not self._unfinished:
                    return None
                if self._to_hash:
                    return self._to_hash.popleft()
                self._pieces_changed.wait(0.5)

    def _offer(self, transfer: Transfer) -> None:
        """Queue a transfer whose next bytes in order are there; the lock is held."""
        if transfer.being_hashed or transfer.starting_over or transfer.done:
            return
        if transfer.frontier == transfer.file.size or transfer.pieces.at(transfer.frontier) is not None:
            transfer.being_hashed = True
            self._to_hash.append(transfer)
            self._pieces_changed.notify()

    def _hash_piece(self, transfer: Transfer, buffer: memoryview) -> bool:
        """Hash the next piece in order; False if it is not there."""
        with self._lock:
            piece = None if transfer.starting_over or self._stopped else transfer.pieces.at(transfer.frontier)
        if piece is None:
            return False
        data = buffer[: piece.length]
        got = os.preadv(transfer.fd, [data], piece.offset)
        kept = piece.offset in transfer.kept
        if got != piece.length or (kept and crc32c.crc32c(data) != piece.crc32c):
            # An earlier run wrote it, and a power failure came before the disk had it.
            with self._lock:
                transfer.pieces.remove(piece)
                transfer.add_range(piece.offset, piece.end)
                self._behind(transfer, piece)
                self._ranges_changed.notify_all()
            self._progress.found(-piece.length)
            return False
        try:
            transfer.reader.begin_update(data, self._executor)
        except BadWeights as error:
            self._start_over(transfer, FetchError(Reason.BAD_WEIGHTS, str(error), path=transfer.file.path))
            return False
        with self._lock:
            transfer.frontier = piece.end
            self._behind(transfer, piece)
            if transfer.pending and transfer.pending[0][0] <= transfer.frontier + PIECE_BYTES:
                self._ranges_changed.notify()
        if transfer.frontier - transfer.released >= 2 * _RELEASE_BYTES:
            pagecache.drop_written(transfer.fd, transfer.released, _RELEASE_BYTES)
            transfer.released += _RELEASE_BYTES
        return True

    def _behind(self, transfer: Transfer, piece: Piece) -> None:
        """A piece no longer waits in memory; the lock is held."""
        if piece.offset in transfer.kept:
            transfer.kept.discard(piece.offset)
            return
        self._ahead -= piece.length
        if self._full and self._ahead <= WINDOW_BYTES // 2:
            self._full = False
            self._ranges_changed.notify_all()

    def _complete(self, transfer: Transfer) -> None:
        try:
            received, problem = transfer.reader.finish(transfer.fd)
        except BadWeights as error:
            raise FetchError(Reason.BAD_WEIGHTS, str(error), path=transfer.file.path) from None
        if received is None:
            self._start_over(transfer, _mismatch(transfer, problem))
            return
        with space_errors(transfer.part.parent, f"storing {transfer.file.path}"):
            pagecache.drop_written(transfer.fd, transfer.released, transfer.file.size - transfer.released)
        transfer.close()
        self._completed(transfer, received)
        transfer.forget_log()

    def _completed(self, transfer: Transfer, received: Received) -> None:
        self._on_complete(received, transfer.part)
        self._progress.file_done()
        with self._lock:
            transfer.done = True
            self._open.remove(transfer)
            self._unfinished -= 1
            self._ranges_changed.notify()
            if not self._unfinished:
                self._stop()

    def _start_over(self, transfer: Transfer, problem: FetchError) -> None:
        """Fetch a file once more from its first byte: what came may have been spoilt on the way."""
        if transfer.restarts:
            # Kept bytes would only fail again; a later run begins with none.
            transfer.forget_log()
            raise problem
        with self._lock:
            transfer.restarts += 1
            transfer.starting_over = True

    def _reset_if_due(self, transfer: Transfer) -> None:
        """Reset a transfer that starts over once nobody is at work on it; the lock is held."""
        if transfer.starting_over and not transfer.active and not transfer.being_hashed:
            for piece in transfer.pieces:
                if piece.offset >= transfer.frontier:
                    self._behind(transfer, piece)
            self._progress.found(-transfer.reset())
            self._ranges_changed.notify_all()


@dataclass
class _Patience:
    """What happened to a range since its last byte."""

    failures: int = 0
    refusals: int = 0
    silent_seconds: float = 0.0


class _StoppedError(Exception):
    """Ends a worker's thread because another one failed."""


def _hashers() -> int:
    return min(4, os.cpu_count() or 1)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def _fill(body: Body, buffer: memoryview) -> tuple[int, TransportError | None]:
    """Read until the buffer is full, the body ends or breaks, or it is time to write what came."""
    filled = 0
    began = time.monotonic()
    while filled < len(buffer):
        try:
            got = body.read_into(buffer[filled:])
        except TransportError as error:
            return filled, error
        if got == 0:
            return filled, TransportError("the answer ended too early")
        filled += got
        if time.monotonic() - began > FLUSH_SECONDS:
            break
    return filled, None


def _mismatch(transfer: Transfer, problem: str) -> FetchError:
    name = transfer.file.path
    text = f"{name} arrived twice with wrong content: {problem}. The source or a proxy on the way damages it."
    return FetchError(Reason.CHECKSUM_MISMATCH, text, path=name)


def _refused(transfer: Transfer, failure: RetryError) -> FetchError:
    text = f"{failure}; check the secret, its permissions, and whether access was granted."
    return FetchError(Reason.AUTH_FAILED, text, path=transfer.file.path)
