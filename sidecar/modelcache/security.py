"""How a client shows who it is and whom it trusts: a bearer token from a file, and certificates for TLS."""

from __future__ import annotations

import functools
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelcache.errors import AccessDenied, AddressError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CA_VARIABLE", "TOKEN_VARIABLE", "Security"]

TOKEN_VARIABLE: Final = "MODELCACHE_TOKEN_FILE"  # noqa: S105 - the name of a variable, not a secret
CA_VARIABLE: Final = "MODELCACHE_CA_FILE"


@dataclass(frozen=True)
class Security:
    """What a connection needs besides an address.

    Attributes:
        token_file: with a bearer token, read anew for each request, since tokens are rotated; empty: none is sent.
        ca_file: certificates (PEM) of the authorities that are trusted; empty: those of the system.
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
        if not self.token_file:
            return None
        try:
            token = Path(self.token_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AccessDenied(f"The token file {self.token_file} cannot be read: {error}.") from error
        if not token or not token.isprintable():
            raise AccessDenied(f"The token file {self.token_file} holds no bearer token.")
        return token

    def roots(self) -> bytes | None:
        """The trusted certificates, for gRPC; None: its own list."""
        return self._read() if self.ca_file else None

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        """For TLS on the HTTP lane."""
        return ssl.create_default_context(cadata=self._read().decode("ascii") if self.ca_file else None)

    def _read(self) -> bytes:
        try:
            content = Path(self.ca_file).read_bytes()
            ssl.create_default_context(cadata=content.decode("ascii"))
        except (OSError, UnicodeDecodeError, ssl.SSLError) as error:
            raise AddressError(f"The CA file {self.ca_file} cannot be used: {error}. It must be PEM.") from error
        return content
