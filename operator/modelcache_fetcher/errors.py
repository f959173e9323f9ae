"""What can go wrong in a fetch: one error that carries a reason of the shared table, and one internal signal."""

from modelcache_api.reasons import Reason


class FetchError(Exception):
    """A fetch or plan that failed.

    The message says what happened, to what, and what the user can do; it never contains a token, a header or a URL's
    query.

    Attributes:
        reason: The row of the table shared by command line, Jobs and operator.
        path: The file concerned, relative to the repo or prefix.
        retry_after: Seconds that the source asked to wait, if it did.
    """

    def __init__(
        self, reason: Reason, message: str, *, path: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.path = path
        self.retry_after = retry_after


class SourceChangedError(Exception):
    """A file is no longer what the plan says: the plan must be made anew. Never leaves this package.

    Attributes:
        path: The file that changed.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path
