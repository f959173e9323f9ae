"""How a client shows who it is and whom it trusts: a bearer token from a file, and certificates for TLS."""

from __future__ import annotations

import functools
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelcache.errors import AccessDenied, AddressError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CA_VARIABLE", "TOKEN_VARIABLE", "Security"]

TOKEN_VARIABLE: Final = "MODELCACHE_TOKEN_FILE"  # noqa: S105 - the name of a variable, not a secret
CA_VARIABLE: Final = "MODELCACHE_CA_FILE"

# A file that was written to so recently may be written to again within one tick of the file system's clock.
_SETTLED_NANOSECONDS: Final = 1_000_000_000


class _TokenFile:
    """A bearer token in a file that is rotated: replaced, written to, or behind a link that is changed (Kubernetes)."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._known: tuple[tuple[int, ...], str] | None = None

    def token(self) -> str:
        """What the file holds now; opened only if it is not the one that was read last, as it was then."""
        try:
            status = self._path.stat()
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known = self._known
            if known is not None and known[0] == state:
                return known[1]
            token = self._path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AccessDenied(f"The token file {self._path} cannot be read: {error}.") from error
        if not token or not token.isprintable():
            raise AccessDenied(f"The token file {self._path} holds no bearer token.")
        settled = time.time_ns() - status.st_ctime_ns > _SETTLED_NANOSECONDS
        self._known = (state, token) if settled else None
        return token


@dataclass(frozen=True)
class Security:
    """What a connection needs besides an address.

    Attributes:
        token_file: with a bearer token; looked at for each request, since tokens are rotated; empty: none is sent.
        ca_file: authorities that are trusted (PEM); empty: public ones (gRPC's; over HTTP the system's).
    """

    token_file: str = ""
    ca_file: str = ""

    @classmethod
    def of(
        cls,
        token_file: str | os.PathLike[str] | None,
        ca_file: str | os.PathLike[str] | None,
        environ: Mapping[str, str],
    ) -> Security:
        """Arguments come before MODELCACHE_TOKEN_FILE and MODELCACHE_CA_FILE."""
        return cls(
            os.fspath(token_file or environ.get(TOKEN_VARIABLE, "")), os.fspath(ca_file or environ.get(CA_VARIABLE, ""))
        )

    def token(self) -> str | None:
        """The token as it is in its file now.

        Raises:
            AccessDenied: the file cannot be read, or holds no token.
        """
        return self._token_file.token() if self.token_file else None

    def authorization(self) -> str | None:
        """The value of the header that sends the token, on both lanes; None where none is sent.

        Raises:
            AccessDenied: as ``token``.
        """
        token = self.token()
        return f"Bearer {token}" if token is not None else None

    def roots(self) -> bytes | None:
        """The trusted certificates, for gRPC; None: its own list."""
        return self._read() if self.ca_file else None

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        """For TLS on the HTTP lane."""
        return ssl.create_default_context(cadata=self._read().decode("ascii") if self.ca_file else None)

    @functools.cached_property
    def _token_file(self) -> _TokenFile:
        return _TokenFile(self.token_file)

    def _read(self) -> bytes:
        try:
            content = Path(self.ca_file).read_bytes()
            ssl.create_default_context(cadata=content.decode("ascii"))
        except (OSError, UnicodeDecodeError, ssl.SSLError) as error:
            raise AddressError(f"The CA file {self.ca_file} cannot be used: {error}. It must be PEM.") from error
        return content
