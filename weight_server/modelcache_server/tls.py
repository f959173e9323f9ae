"""TLS for both lanes from one pair of files, which may be replaced while the server runs."""

import logging
import ssl
from dataclasses import dataclass

import grpc

from modelcache_server.errors import ServerError
from modelcache_server.settings import TlsSettings
from modelcache_server.watched_file import WatchedFiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


class Certificates:
    """The server's certificate; new connections get the newest.

    Raises:
        ServerError: The files cannot be read, or do not belong together.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        try:
            self._pair = WatchedFiles((settings.certificate, settings.private_key), self._read, self._complain)
        except (OSError, ValueError) as error:
            raise ServerError(
                f"TLS is not possible with {settings.certificate} and {settings.private_key}: {error}. "
                "Both must be PEM files and belong together."
            ) from error
        self._given = self._pair.get()

    def context(self) -> ssl.SSLContext:
        """For the next HTTP connection."""
        return self._pair.get().context

    def credentials(self) -> grpc.ServerCredentials:
        """For the gRPC port; they follow the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._given.grpc,
            self._newer,  # type: ignore[arg-type]  # None is allowed: nothing changed
            require_client_authentication=False,
        )

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Grpc asks at each handshake; None keeps what it has."""
        pair = self._pair.get()
        if pair is self._given:
            return None
        self._given = pair
        return pair.grpc

    def _read(self) -> _Pair:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._settings.certificate, self._settings.private_key)
        chain = self._settings.certificate.read_bytes()
        key = self._settings.private_key.read_bytes()
        return _Pair(context, grpc.ssl_server_certificate_configuration([(key, chain)]))

    def _complain(self, error: Exception) -> None:
        _log.error("new certificate not used, the old one stays: %s", error)
