"""Proxies and private authorities, as the environment names them."""

import pytest

from modelcache_api.reasons import REASONS, Reason
from modelcache_fetcher import FetchError, run_fetch
from support.fake_hub import fake_hub
from support.fetching import contents, options, run_program, safetensors_bytes, spec
from support.proxies import ForwardProxy, TlsFront, private_certificate

FILES = {"config.json": b"{}", "model.safetensors": safetensors_bytes({"a": 3 * 2**20})}


@pytest.fixture
def hub():
    with fake_hub() as hub:
        hub.commit("org/name", FILES)
        yield hub


@pytest.fixture
def proxy(hub):
    proxy = ForwardProxy({"hub.test": ("127.0.0.1", hub.api.port), "files.test": ("127.0.0.1", hub.cdn.port)})
    hub.cdn.url = "http://files.test"
    yield proxy
    proxy.stop()


def program(tmp_path, endpoint, **environment):
    """A process of its own: libraries keep what they read of their environment."""
    target = ("--volume", tmp_path / "v", "--name", "model")
    return run_program("fetch", {"repoId": "org/name", "endpoint": endpoint}, *target, **environment)


def test_everything_goes_through_the_proxy_with_its_login(hub, proxy, tmp_path):
    with_login = proxy.url.replace("http://", "http://me:p%40ss@")
    done = program(tmp_path, "http://hub.test", HTTP_PROXY=with_login)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES
    assert any("http://files.test/files/" in line for line in proxy.asked)
    assert any("http://hub.test/api/" in line for line in proxy.asked)
    assert len(proxy.logins) == len(proxy.asked)
    assert "p%40ss" not in done.stdout + done.stderr


def test_hosts_of_no_proxy_are_asked_directly(hub, tmp_path):
    proxy = ForwardProxy({})
    done = program(tmp_path, hub.url, HTTP_PROXY=proxy.url, NO_PROXY="127.0.0.1")
    proxy.stop()
    assert done.returncode == 0, done.stderr
    assert proxy.asked == []
    assert contents(tmp_path / "v", "model") == FILES


@pytest.fixture
def tls(hub, tmp_path):
    chain, authority = private_certificate(tmp_path, "hub.test", "files.test")
    fronts = [TlsFront(hub.api.port, chain), TlsFront(hub.cdn.port, chain)]
    hub.cdn.url = fronts[1].url
    yield fronts, authority
    for front in fronts:
        front.stop()


def test_an_unknown_authority_is_unavailable_and_named(hub, tls, tmp_path):
    fronts, _ = tls
    done = program(tmp_path, fronts[0].url)
    assert done.returncode == REASONS[Reason.UNAVAILABLE].exit_code
    assert "certificate" in done.stderr.lower()


@pytest.mark.parametrize("variable", ["MODELCACHE_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_authority_is_trusted(hub, tls, tmp_path, variable):
    fronts, authority = tls
    done = program(tmp_path, fronts[0].url, **{variable: str(authority)})
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES


def test_https_goes_through_a_proxy_by_tunnel(hub, tls, tmp_path):
    fronts, authority = tls
    hub.cdn.url = "https://files.test"
    proxy = ForwardProxy(
        {"hub.test:443": ("127.0.0.1", fronts[0].port), "files.test:443": ("127.0.0.1", fronts[1].port)}
    )
    done = program(tmp_path, "https://hub.test", HTTPS_PROXY=proxy.url, MODELCACHE_CA_BUNDLE=str(authority))
    proxy.stop()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES
    assert {line.split()[1] for line in proxy.asked} == {"hub.test:443", "files.test:443"}


def test_a_bundle_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty.pem").write_text("")
    done = program(tmp_path, "https://hub.test", MODELCACHE_CA_BUNDLE=str(tmp_path / "empty.pem"))
    assert done.returncode == REASONS[Reason.INVALID_SPEC].exit_code


def test_a_redirect_from_https_to_http_is_not_followed(hub, tls, tmp_path):
    fronts, authority = tls
    hub.cdn.url = f"http://127.0.0.1:{hub.cdn.port}"
    done = program(tmp_path, fronts[0].url, MODELCACHE_CA_BUNDLE=str(authority))
    assert done.returncode == REASONS[Reason.INVALID_SOURCE].exit_code
    assert "unprotected" in done.stderr


def test_a_host_that_does_not_exist_is_unavailable(tmp_path):
    with pytest.raises(FetchError) as caught:
        run_fetch(spec("org/name", endpoint="http://no-such-host.invalid"), tmp_path, "model", options=options())
    assert caught.value.reason is Reason.UNAVAILABLE
