"""Private authorities are trusted beside the public ones, whatever the image has of them."""

import os
import ssl
import tempfile

import certifi
import pytest

from modelcache_fetcher.trust import trust_authorities
from support.proxies import private_certificate


def authorities(path):
    return set(ssl.create_default_context(cafile=path).get_ca_certs(binary_form=True))


@pytest.fixture
def private(tmp_path, monkeypatch):
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")  # put back after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, authority = private_certificate(tmp_path, "hub.test")
    monkeypatch.setenv("MODELCACHE_CA_BUNDLE", str(authority))
    return str(authority)


@pytest.mark.parametrize("has_system_file", [True, False], ids=["system", "certifi"])
def test_the_public_authorities_stay(private, monkeypatch, has_system_file):
    if not has_system_file:  # as in an image with a folder of certificates only
        paths = ssl.get_default_verify_paths()._replace(cafile=None)
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    public = ssl.get_default_verify_paths().cafile or certifi.where()
    trust_authorities()
    bundles = {os.environ[name] for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")}
    assert len(bundles) == 1
    assert authorities(bundles.pop()) == authorities(private) | authorities(public)
