"""The weight server: one block cache, an HTTP lane for bytes and a gRPC lane for everything."""

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
