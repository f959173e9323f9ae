import base64
import json
import time
from datetime import datetime

import jwt
import pytest

from modelcache_server import ServerError, TokenSettings
from modelcache_server.access import TokenVerifier
from modelcache_server.errors import Reason, RequestError
from support.server_security import AUDIENCE, ISSUER, Issuer


@pytest.fixture(scope="module")
def issuer():
    issuer = Issuer()
    issuer.add_rsa("rsa")
    issuer.add_ec("ec")
    return issuer


@pytest.fixture
def key_set(issuer, tmp_path):
    return issuer.publish(tmp_path / "jwks.json")


@pytest.fixture
def verifier(key_set):
    return TokenVerifier(TokenSettings(key_set, ISSUER, AUDIENCE, ("default/reader", "team/*")))


def refusal(verifier, token: str | None) -> Reason:
    with pytest.raises(RequestError) as caught:
        verifier(token if token is None else f"Bearer {token}")
    if token:
        assert token not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("kid", ["rsa", "ec"])
def test_tokens_of_allowed_accounts_are_let_through(verifier, issuer, kid):
    for account in ("default/reader", "team/anyone"):
        for _ in range(2):  # checked, then remembered
            verifier(f"Bearer {issuer.token(account, kid=kid)}")
    verifier(f"bearer {issuer.token()}")


@pytest.mark.parametrize("account", ["default/other", "other/reader", "teams/x", "team/", "/x"])
def test_other_accounts_are_denied(verifier, issuer, account):
    assert refusal(verifier, issuer.token(account)) is Reason.PERMISSION_DENIED


@pytest.mark.parametrize("subject", ["reader", "system:serviceaccount:default:reader:x", "system:node:n", ""])
def test_subjects_that_are_no_service_accounts_are_denied(verifier, issuer, subject):
    assert refusal(verifier, issuer.token(sub=subject)) is Reason.PERMISSION_DENIED


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": ["https://kubernetes.default.svc"]},
        {"aud": None},
        {"iss": "https://elsewhere"},
        {"iss": None},
        {"sub": None},
        {"exp": None},
        {"exp": "tomorrow"},
        {"exp": 10**400},
        {"exp": int(time.time()) - 60},
        {"nbf": int(time.time()) + 600},
    ],
)
def test_tokens_with_wrong_claims_are_not_valid(verifier, issuer, claims):
    assert refusal(verifier, issuer.token(**claims)) is Reason.UNAUTHENTICATED


def test_no_token_or_nonsense_is_not_valid(verifier, issuer):
    good = issuer.token()
    assert refusal(verifier, None) is Reason.UNAUTHENTICATED
    for token in ("", "x", "a.b.c", good[:-4] + "AAAA", good + "x", "é.é.é", "x" * 20_000, good.replace(".", "..")):
        assert refusal(verifier, token) is Reason.UNAUTHENTICATED
    with pytest.raises(RequestError):
        verifier(f"Basic {good}")


def test_unsigned_and_symmetric_tokens_are_not_valid(verifier, issuer, key_set):
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    none = jwt.encode(claims, None, algorithm="none", headers={"kid": "rsa"})
    assert refusal(verifier, none) is Reason.UNAUTHENTICATED
    # The classic: the public key, which everybody has, taken for an HMAC secret.
    header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": "rsa"}).encode()).rstrip(b"=").decode()
    body = issuer.token().split(".")[1]
    assert refusal(verifier, f"{header}.{body}.{'A' * 43}") is Reason.UNAUTHENTICATED


def test_symmetric_keys_of_a_key_set_verify_nothing(issuer, tmp_path):
    secret = base64.urlsafe_b64encode(b"s" * 64).rstrip(b"=").decode()
    path = issuer.publish(tmp_path / "jwks.json", {"kty": "oct", "k": secret, "kid": "shared", "alg": "HS256"})
    verifier = TokenVerifier(TokenSettings(path, ISSUER, AUDIENCE, ("default/reader",)))
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    token = jwt.encode(claims, b"s" * 64, algorithm="HS256", headers={"kid": "shared"})
    assert refusal(verifier, token) is Reason.UNAUTHENTICATED
    verifier(f"Bearer {issuer.token()}")


def test_a_token_of_an_unknown_or_another_key_is_not_valid(verifier, issuer):
    stranger = Issuer()
    stranger.add_ec("rsa")
    stranger.add_ec("unknown")
    assert refusal(verifier, stranger.token(kid="rsa")) is Reason.UNAUTHENTICATED
    assert refusal(verifier, stranger.token(kid="unknown")) is Reason.UNAUTHENTICATED
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    swapped = jwt.encode(claims, issuer.keys["rsa"], algorithm="RS256", headers={"kid": "ec"})
    assert refusal(verifier, swapped) is Reason.UNAUTHENTICATED


def test_a_remembered_token_still_expires(verifier, issuer, monkeypatch):
    token = issuer.token(seconds=60)
    verifier(f"Bearer {token}")
    later = time.time() + 120
    monkeypatch.setattr(time, "time", lambda: later)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(later, tz)

    monkeypatch.setattr("jwt.api_jwt.datetime", Later)
    assert refusal(verifier, token) is Reason.UNAUTHENTICATED


def test_a_rotated_key_set_is_followed_and_a_broken_one_ignored(issuer, key_set, verifier, monkeypatch):
    token = issuer.token(kid="rsa")
    verifier(f"Bearer {token}")
    clock = [time.monotonic()]
    monkeypatch.setattr("modelcache_server.watched_file.time.monotonic", lambda: clock[0])
    key_set.write_text("{half a fi")
    clock[0] += 2
    verifier(f"Bearer {token}")
    rotated = Issuer()
    rotated.add_ec("new")
    rotated.publish(key_set)
    clock[0] += 2
    verifier(f"Bearer {rotated.token()}")
    assert refusal(verifier, token) is Reason.UNAUTHENTICATED, "its key was withdrawn, though the token was remembered"
    key_set.unlink()
    clock[0] += 2
    verifier(f"Bearer {rotated.token()}")


def test_what_is_remembered_is_bounded(verifier, issuer, monkeypatch):
    monkeypatch.setattr("modelcache_server.access._REMEMBERED", 3)
    for number in range(6):
        verifier(f"Bearer {issuer.token(kid='ec', jti=str(number))}")
    assert len(verifier._verified) == 3


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"keys": 5}', '{"keys": []}', '{"keys": [{"kty": "oct", "kid": "a"}]}']
)
def test_a_key_set_that_cannot_verify_anything_is_refused_at_the_start(tmp_path, content):
    path = tmp_path / "jwks.json"
    path.write_text(content)
    with pytest.raises(ServerError, match="key set"):
        TokenVerifier(TokenSettings(path, ISSUER, AUDIENCE, ("a/b",)))
    path.unlink()
    with pytest.raises(ServerError, match="key set"):
        TokenVerifier(TokenSettings(path, ISSUER, AUDIENCE, ("a/b",)))
