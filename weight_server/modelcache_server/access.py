"""Bearer tokens, verified offline: ServiceAccount tokens (JWT, RFC 7519) against a key set (RFC 7517)."""

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import jwt

from modelcache_server.errors import Reason, RequestError, ServerError
from modelcache_server.settings import TokenSettings
from modelcache_server.watched_file import WatchedFiles

_log = logging.getLogger(__name__)
# Asymmetric only: whoever may verify must not be able to sign.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_REQUIRED = ("exp", "iss", "aud", "sub")
_MAX_TOKEN_BYTES = 16 * 1024
_MAX_CLOCK_SKEW_SECONDS = 5
_REMEMBERED = 4096
_SUBJECT_PREFIX = "system:serviceaccount:"

KeySet = dict[str, jwt.PyJWK]


@dataclass(frozen=True)
class _Verified:
    subject: str
    expires: float
    keys: KeySet  # with which it was verified


class TokenVerifier:
    """Lets through who presents a valid token of an allowed service account. Thread safe.

    Raises:
        ServerError: The key set cannot be read.
    """

    def __init__(self, settings: TokenSettings) -> None:
        self._settings = settings
        self._allowed = frozenset(settings.service_accounts)
        try:
            self._keys = WatchedFiles((settings.key_set,), self._read, self._complain)
        except (OSError, ValueError) as error:
            raise ServerError(f"The key set {settings.key_set} cannot be used: {error}.") from error
        self._lock = threading.Lock()
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()

    def __call__(self, authorization: str | None) -> None:
        """Check a request's Authorization header.

        Raises:
            RequestError: UNAUTHENTICATED without a valid token, PERMISSION_DENIED for an account that is not allowed.
        """
        if authorization is None:
            raise _unauthenticated("a bearer token is needed")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN_BYTES:
            raise _unauthenticated("the Authorization header is not a bearer token")
        self._authorize(self._subject(token.strip()))

    def _subject(self, token: str) -> str:
        """Whose token it is; the signature is checked once, the expiry each time."""
        keys = self._keys.get()
        name = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        with self._lock:
            known = self._verified.get(name)
            if known is not None and known.keys is keys and time.time() < known.expires:
                return known.subject
            self._verified.pop(name, None)
        verified = self._verify(token, keys)
        with self._lock:
            self._verified[name] = verified
            while len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)
        return verified.subject

    def _verify(self, token: str, keys: KeySet) -> _Verified:
        try:
            header = jwt.get_unverified_header(token)
            key = keys.get(str(header.get("kid", "")))
            if key is None:
                raise _unauthenticated("the token was signed with a key that this server does not know")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(_ALGORITHMS),
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=_MAX_CLOCK_SKEW_SECONDS,
                options={"require": list(_REQUIRED)},
            )
            subject = claims["sub"]
            if not isinstance(subject, str):
                raise _unauthenticated("the token's subject is no text")
            return _Verified(subject, float(claims["exp"]) + _MAX_CLOCK_SKEW_SECONDS, keys)
        except jwt.ExpiredSignatureError:
            raise _unauthenticated("the token has expired") from None
        except jwt.InvalidAudienceError:
            raise _unauthenticated(f"the token is not for the audience {self._settings.audience!a}") from None
        except jwt.InvalidIssuerError:
            raise _unauthenticated("the token is from another issuer") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise _unauthenticated(f"the token is not valid ({type(error).__name__})") from None

    def _authorize(self, subject: str) -> None:
        namespace, separator, name = subject.removeprefix(_SUBJECT_PREFIX).partition(":")
        if subject.startswith(_SUBJECT_PREFIX) and separator and namespace and name:
            if f"{namespace}/{name}" in self._allowed or f"{namespace}/*" in self._allowed:
                return
            who = f"the service account {namespace}/{name}"
        else:
            who = "this token's subject"
        raise RequestError(
            Reason.PERMISSION_DENIED,
            f"{who[0].upper()}{who[1:]} may not read from this server: "
            "add it to spec.server.access.serviceAccounts of the ModelCache.",
        )

    def _read(self) -> KeySet:
        document = json.loads(self._settings.key_set.read_text(encoding="utf-8"))
        entries = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise ValueError('it has no list "keys"')  # noqa: TRY004 - the file's content is wrong, not a caller's type
        keys: KeySet = {}
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
                continue  # tokens name their key; one without a name verifies nothing
            try:
                key = jwt.PyJWK(entry)
            except (jwt.PyJWTError, KeyError, ValueError, TypeError) as error:
                _log.warning("key of the key set not used kid=%s: %r", entry["kid"], error)
                continue
            if key.algorithm_name in _ALGORITHMS:
                keys.setdefault(entry["kid"], key)
        if not keys:
            raise ValueError("it has no key that could verify a token")
        return keys

    def _complain(self, error: Exception) -> None:
        _log.error("new key set not used, the old one stays: %s", error)


def _unauthenticated(why: str) -> RequestError:
    return RequestError(Reason.UNAUTHENTICATED, f"Not authenticated: {why}.")
