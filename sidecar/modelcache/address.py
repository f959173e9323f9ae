"""Where a name is served: pure functions of the name, the ``address=`` argument and the environment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache.errors import AddressError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_PORT", "ENVIRONMENT_VARIABLE", "Endpoint", "parse_endpoint", "resolve"]

DEFAULT_PORT = 9090
ENVIRONMENT_VARIABLE = "MODELCACHE_ADDRESS"
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_SCHEMES = ("dns:///", "grpc://", "http://", "grpcs://", "https://")
_TLS = ("grpcs://", "https://")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One weight server, or a name that stands for its replicas.

    Attributes:
        host: name or IP address, without brackets.
        port: of the gRPC API.
        tls: whether it is asked over TLS.
    """

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def resolve(name: str, address: str | None, environ: Mapping[str, str]) -> tuple[Endpoint, ...]:
    """Finds the servers to ask for ``name``.

    Args:
        name: a ModelCache's name (``bert-base``) or a repoId (``google-bert/bert-base-uncased``).
        address: ``host[:port]``, or several separated by commas; overrides everything else.
        environ: the process environment; ``MODELCACHE_ADDRESS`` counts when there is no ``address``.

    Returns:
        At least one endpoint, in the order in which they are tried.

    Raises:
        AddressError: an address cannot be parsed, or a repoId comes without one.
    """
    given = address or environ.get(ENVIRONMENT_VARIABLE, "")
    if given:
        return tuple(parse_endpoint(part) for part in given.split(",") if part.strip())
    if not name:
        raise AddressError(f"Give a model name, or say where it is served with address= or {ENVIRONMENT_VARIABLE}.")
    if is_repo_id(name):
        raise AddressError(
            f"{name!r} is a repository, and a repository does not say where it is served: pass "
            f'address="HOST:{DEFAULT_PORT}", set {ENVIRONMENT_VARIABLE}, or use the name of its ModelCache.'
        )
    if not _LABEL.fullmatch(name.partition(".")[0]):
        raise AddressError(
            f"{name!r} is not the name of a ModelCache (lower-case letters, digits and dashes, at most 40)."
        )
    host, dot, namespace = name.partition(".")
    return (Endpoint(f"{host}-weights{dot}{namespace}", DEFAULT_PORT),)


def is_repo_id(name: str) -> bool:
    """Whether ``name`` is a repoId (it has a slash) and not the name of a ModelCache."""
    return "/" in name


def parse_endpoint(text: str) -> Endpoint:
    """Parses ``host``, ``host:port``, ``[v6]:port``, each optionally after ``dns:///``, ``grpc://`` or ``http://``.

    After ``https://`` or ``grpcs://`` it is asked over TLS.

    Raises:
        AddressError: it is none of these.
    """
    rest = text.strip()
    for scheme in _SCHEMES:
        rest = rest.removeprefix(scheme)
    rest = rest.rstrip("/")
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/\[\]]+))(?::(\d{1,5}))?", rest)
    port = int(match[3]) if match and match[3] else DEFAULT_PORT
    if match is None or not 0 < port < 65536:
        raise AddressError(f"{text!r} is not an address: write HOST:PORT, such as bert-base-weights:{DEFAULT_PORT}.")
    return Endpoint(match[1] or match[2], port, text.strip().startswith(_TLS))
