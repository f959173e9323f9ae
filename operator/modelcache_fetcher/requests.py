"""One request for a range of a file: asking, judging the answer, and saying what a refusal means."""

import re
import threading
from dataclasses import dataclass, replace

from modelcache_api.reasons import REASONS, Reason
from modelcache_fetcher.errors import FetchError, SourceChangedError
from modelcache_fetcher.retry import parse_retry_after
from modelcache_fetcher.sources import HttpLocation, LocalLocation, Location, Source
from modelcache_fetcher.transfer import Transfer
from modelcache_fetcher.transport import (
    PRIVATE_HEADERS,
    Answer,
    Body,
    HttpTransport,
    LocalBody,
    TransportError,
    host_of,
)

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SKIP_BYTES = 2**20


class RetryError(Exception):
    """A request that failed and may succeed later.

    Attributes:
        reason: What it becomes when the patience ends.
        wait: Seconds that the source asked to wait, if it did.
        silent_seconds: How long no byte came.
        refused: The source did not accept the credentials or the signature.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        wait: float | None = None,
        silent_seconds: float = 0.0,
        refused: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.wait = wait
        self.silent_seconds = silent_seconds
        self.refused = refused


@dataclass
class Requester:
    """Opens ranges of a source's files; shared by all receivers.

    Attributes:
        source: Says where files are.
        transport: Moves the bytes.
        commit: The revision that is fetched.
    """

    source: Source
    transport: HttpTransport
    commit: str

    def __post_init__(self) -> None:
        # Sources' libraries promise nothing about threads, and one renewal is enough for all of them.
        self._source_lock = threading.Lock()

    def open(self, transfer: Transfer, start: int, end: int) -> Body:
        """The body of bytes [start, end) of the transfer's file.

        Raises:
            RetryError: Try again.
            SourceChangedError: The file is not what was planned.
            FetchError: It will not work.
        """
        location = transfer.direct or transfer.location or self._locate(transfer)
        if isinstance(location, LocalLocation):
            return LocalBody(location, transfer.file.path, start, end)
        headers = {"Accept-Encoding": "identity", "User-Agent": "modelcache-fetch", **location.headers}
        if (start, end) != (0, transfer.file.size):
            headers["Range"] = f"bytes={start}-{end - 1}"
        try:
            answer = self.transport.get(location.url, headers)
            try:
                self._judge(transfer, location, answer, start, end)
            except BaseException:
                answer.body.close()
                raise
        except TransportError as error:
            transfer.direct = None
            raise RetryError(Reason.UNAVAILABLE, str(error), silent_seconds=error.silent_seconds) from None
        if answer.url != location.url:
            # Asking the same signed URL again spares the hub, which counts and limits its redirects.
            kept = {name: value for name, value in location.headers.items() if name.lower() not in PRIVATE_HEADERS}
            transfer.direct = replace(location, url=answer.url, headers=kept)
        return answer.body

    def examine(self, transfer: Transfer) -> None:
        """Complete what the listing says about the transfer's file. Raises as ``open`` does."""
        try:
            transfer.file = self.source.examine(transfer.file)
        except FetchError as error:
            raise _retryable(error) from None

    def renew(self, transfer: Transfer) -> None:
        """Have the source read its credentials again and say anew where the file is."""
        with self._source_lock:
            self.source.renew()
            transfer.location = transfer.direct = None

    def _locate(self, transfer: Transfer) -> Location:
        with self._source_lock:
            try:
                location = transfer.location = self.source.locate(transfer.file, self.commit)
            except FetchError as error:
                raise _retryable(error) from None
        return location

    def _judge(self, transfer: Transfer, location: HttpLocation, answer: Answer, start: int, end: int) -> None:
        name, size, status = transfer.file.path, transfer.file.size, answer.status
        if status in {200, 206} and answer.headers.get("content-encoding", "") not in {
            "",
            "identity",
            location.stored_encoding,
        }:
            text = f"{host_of(answer.url)} sends {name} compressed although it was asked not to"
            raise RetryError(Reason.UNAVAILABLE, text)
        if status == 206:
            told = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            if told is None or int(told[1]) != start or int(told[2]) != end - 1:
                raise RetryError(
                    Reason.UNAVAILABLE, f"{host_of(answer.url)} sent another range of {name} than asked for"
                )
            if told[3] != "*" and int(told[3]) != size:
                raise SourceChangedError(name, f"{name} has {told[3]} bytes instead of {size}.")
            return
        if status == 200:
            length = answer.headers.get("content-length")
            if length is not None and int(length) != size:
                raise SourceChangedError(name, f"{name} has {length} bytes instead of {size}.")
            if start:
                transfer.sequential = True
                _skip(answer.body, start)
            return
        self._refuse(transfer, location, answer)

    def _refuse(self, transfer: Transfer, location: HttpLocation, answer: Answer) -> None:
        name, status, host = transfer.file.path, answer.status, host_of(answer.url)
        if transfer.direct is location and 400 <= status < 500 and status not in {408, 429}:
            transfer.direct = None
            raise RetryError(
                Reason.UNAVAILABLE, f"the signed address of {name} at {host} was refused ({status})", wait=0
            )
        wait = parse_retry_after(answer.headers.get("retry-after"))
        match status:
            case 401 | 403 if answer.url != location.url:
                # The host behind a redirect knows no token, only the signature that the redirect gave: ask for another.
                raise RetryError(Reason.AUTH_FAILED, f"{host} refused the signed address of {name} ({status})")
            case 401 | 403:
                told = _printable(answer.headers.get("x-error-message", ""))
                text = f"{host} refused {name} ({status}{': ' + told if told else ''})"
                raise RetryError(Reason.AUTH_FAILED, text, refused=True)
            case 412:
                raise SourceChangedError(name, f"{name} was replaced at the source.")
            case 404 | 410 | 416:
                raise SourceChangedError(name, f"{name} is no longer at {host} as planned ({status}).")
            case 429:
                raise RetryError(Reason.RATE_LIMITED, f"{host} answered 429 (too many requests) for {name}", wait=wait)
            case 408 | 500 | 502 | 503 | 504 | 509 | 520 | 521 | 522 | 523 | 524 | 529:
                raise RetryError(Reason.UNAVAILABLE, f"{host} answered {status} for {name}", wait=wait)
        raise FetchError(
            Reason.INVALID_SOURCE, f"{host} answered {status} for {name}, which no retry will change.", path=name
        )


def _retryable(error: FetchError) -> RetryError | FetchError:
    """A source's error as one that is tried again, if that can help."""
    if REASONS[error.reason].permanent and error.reason is not Reason.AUTH_FAILED:
        return error
    return RetryError(
        error.reason,
        str(error).rstrip("."),
        wait=error.retry_after,
        refused=error.reason is Reason.AUTH_FAILED,
    )


def _skip(body: Body, count: int) -> None:
    """Read past bytes of a server that sends the whole file whatever range is asked for."""
    buffer = memoryview(bytearray(_SKIP_BYTES))
    while count:
        got = body.read_into(buffer[:count])
        if got == 0:
            raise TransportError("the answer ended too early")
        count -= got


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:200]
