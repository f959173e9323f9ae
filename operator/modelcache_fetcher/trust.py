"""Certificate authorities beside the system's, for all libraries of a fetch at once.

The libraries know different variables (SSL_CERT_FILE, REQUESTS_CA_BUNDLE, AWS_CA_BUNDLE), each of which replaces the
public authorities. MODELCACHE_CA_BUNDLE names a PEM file whose authorities are trusted beside them.
"""

import os
import ssl
import tempfile
from pathlib import Path

import certifi

from modelcache_api.reasons import Reason
from modelcache_fetcher.errors import FetchError

CA_BUNDLE = "MODELCACHE_CA_BUNDLE"
_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")


def trust_authorities() -> None:
    """Have this process trust the authorities in the file that MODELCACHE_CA_BUNDLE names, if it is set.

    Raises:
        FetchError: InvalidSpec: the file cannot be read or holds no certificate.
    """
    path = os.environ.get(CA_BUNDLE)
    if not path:
        return
    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise FetchError(Reason.INVALID_SPEC, f"{CA_BUNDLE}={path} holds no certificates in PEM ({error}).") from None
    # an image may have no system's file: then the libraries trust what certifi has
    candidates = (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, certifi.where())
    public = next(name for name in candidates if name and Path(name).is_file())
    parts = [Path(name).read_text(encoding="utf-8", errors="replace") for name in (public, path)]
    with tempfile.NamedTemporaryFile("w", prefix="modelcache-ca-", suffix=".pem", delete=False) as bundle:
        bundle.write("\n".join(parts))
    for name in _VARIABLES:
        os.environ[name] = bundle.name
