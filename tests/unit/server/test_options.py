import argparse
from pathlib import Path

import pytest

from modelcache_server import ServerSettings, TokenSettings, options
from modelcache_server.settings import cache_bytes_of

MIB = 1 << 20


def settings(*arguments: str) -> ServerSettings:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.settings_from(parser.parse_args(["/volume", *arguments]))


def test_the_defaults_are_those_of_the_documentation(monkeypatch):
    monkeypatch.delenv(options.REDIS_URL_VARIABLE, raising=False)
    chosen = settings()
    assert (chosen.root, chosen.grpc_port, chosen.http_port, chosen.status_port) == (Path("/volume"), 9090, 8080, 9091)
    assert chosen.cache_bytes == 1024 * MIB
    assert chosen.tls is chosen.tokens is chosen.redis is None


@pytest.mark.parametrize(("text", "size"), [("64Mi", 64), ("65Mi", 68), ("1Gi", 1024), ("100M", 96), ("67108864", 64)])
def test_a_cache_is_a_whole_number_of_blocks(text, size):
    assert settings("--cache-size", text).cache_bytes == size * MIB


@pytest.mark.parametrize("text", ["1Mi", "0", "-1", "1.5Gi", "64MiB", "", "a"])
def test_a_cache_size_without_sense_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        settings(f"--cache-size={text}")
    assert "--cache-size" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "1e3", "65536", "", "http"])
def test_a_port_that_is_none_is_refused(text, capsys):
    assert (options.parse_port("0"), options.parse_port("65535")) == (0, 65535)
    with pytest.raises(SystemExit):
        settings(f"--http-port={text}")
    assert "write a number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "warm"), [("all", None), ("none", 0), ("8Mi", 8 * MIB)])
def test_a_warm_up_is_all_nothing_or_a_size(text, warm):
    assert settings("--warmup", text).warmup_bytes == warm


def test_half_of_a_choice_is_refused():
    with pytest.raises(ValueError, match="--tls-key"):
        settings("--tls-cert", "cert.pem")
    with pytest.raises(ValueError, match="--allow"):
        settings("--token-issuer", "https://issuer")


def test_a_redis_url_is_never_shown(tmp_path, monkeypatch):
    url = tmp_path / "url"
    url.write_text("redis://:secret@host\n")
    chosen = settings("--redis-url-file", str(url))
    assert chosen.redis
    assert chosen.redis.url == "redis://:secret@host"
    assert "secret" not in repr(chosen)
    monkeypatch.setenv(options.REDIS_URL_VARIABLE, "redis://other")
    other = settings().redis
    assert other
    assert other.url == "redis://other"


@pytest.mark.parametrize("accounts", [(), ("default",), ("/x",), ("ns/",), ("a/b/c",)])
def test_access_without_a_proper_account_is_refused(accounts):
    with pytest.raises(ValueError, match="account"):
        TokenSettings(Path("k"), "iss", "aud", accounts)


@pytest.mark.parametrize(("mebibytes", "size"), [(0, 64 * MIB), (100, 100 * MIB), (101, 104 * MIB)])
def test_a_size_in_mebibytes_becomes_a_possible_one(mebibytes, size):
    assert cache_bytes_of(mebibytes) == size


def test_impossible_settings_say_what_is_possible():
    with pytest.raises(ValueError, match="multiple of 4 MiB"):
        ServerSettings(root=Path("/v"), cache_bytes=65 * MIB)
