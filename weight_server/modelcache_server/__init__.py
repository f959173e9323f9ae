"""The weight server: one block cache, an HTTP lane for bytes and a gRPC lane for everything.

Imported on first use: `modelcache_server.options` is also read by a command line without the extra `server`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelcache_server.api import AdvancedWeightServer, WeightServer
    from modelcache_server.errors import ServerError
    from modelcache_server.server import Addresses, Server
    from modelcache_server.settings import HttpLimits, RedisSettings, ServerSettings, TlsSettings, TokenSettings

__all__ = [
    "Addresses",
    "AdvancedWeightServer",
    "HttpLimits",
    "RedisSettings",
    "Server",
    "ServerError",
    "ServerSettings",
    "TlsSettings",
    "TokenSettings",
    "WeightServer",
]

_HOMES = {
    "Addresses": "server",
    "AdvancedWeightServer": "api",
    "HttpLimits": "settings",
    "RedisSettings": "settings",
    "Server": "server",
    "ServerError": "errors",
    "ServerSettings": "settings",
    "TlsSettings": "settings",
    "TokenSettings": "settings",
    "WeightServer": "api",
}


def __getattr__(name: str) -> object:
    """The public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
