"""Everything that this package raises on purpose: one hierarchy, each message a sentence with what to do."""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "AddressError",
    "Cancelled",
    "FileNotInSnapshot",
    "IntegrityError",
    "MissingWeights",
    "ModelCacheError",
    "NotReady",
    "RevisionGone",
    "Unavailable",
    "UnsupportedModel",
]


class ModelCacheError(Exception):
    """Root of the errors of this package.

    Example:
        >>> try:
        ...     StreamingBertModel("bert-base")
        ... except ModelCacheError as error:
        ...     print(error)
    """


class AddressError(ModelCacheError):
    """The name or address cannot be turned into a server to ask, or that server serves another model."""


class AccessDenied(ModelCacheError):
    """The server wants a bearer token, or another one than was sent."""


class Cancelled(ModelCacheError):
    """The model was cleaned up while this read was under way."""


class NotReady(ModelCacheError):
    """The server was not there, or had no active revision, until ``wait_timeout`` passed."""


class Unavailable(ModelCacheError):
    """No server answered until the deadline; the call can be repeated.

    Layers of a streamed model and files of ``snapshot()`` that were whole are kept; a whole load begins anew.
    """


class RevisionGone(ModelCacheError):
    """The pinned digest is no longer on the volume; ``refresh()`` moves the model to the active one."""


class FileNotInSnapshot(ModelCacheError):
    """The snapshot has no such file, often because ``allowPatterns`` of the ModelCache leave it out."""


class IntegrityError(ModelCacheError):
    """Bytes differ from what was published, after one retry over another connection.

    Attributes:
        path: the file in the snapshot.
        tensor: the tensor whose checksum differs; empty for a whole file.
    """

    def __init__(self, message: str, *, path: str = "", tensor: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class MissingWeights(ModelCacheError):
    """The snapshot lacks weights that the model needs; transformers would fill them with random numbers.

    Attributes:
        names: the parameters, as the model calls them.
    """

    def __init__(self, message: str, *, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class UnsupportedModel(ModelCacheError):
    """This model, or this use of it, cannot be streamed; the message says what works instead."""
