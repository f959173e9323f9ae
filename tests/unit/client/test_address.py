"""A name becomes the servers to ask, or a sentence that says what to write."""

import pytest

from modelcache.address import Endpoint, parse_endpoint, resolve
from modelcache.errors import AddressError


def test_a_modelcache_is_found_by_its_service_name():
    assert resolve("bert-base", None, {}) == (Endpoint("bert-base-weights", 9090),)


def test_a_name_may_carry_its_namespace():
    assert resolve("bert-base.models", None, {}) == (Endpoint("bert-base-weights.models", 9090),)


def test_the_argument_comes_before_the_environment():
    environment = {"MODELCACHE_ADDRESS": "elsewhere:1"}
    assert resolve("x", "here:2", environment) == (Endpoint("here", 2),)
    assert resolve("x", None, environment) == (Endpoint("elsewhere", 1),)


def test_several_replicas_are_separated_by_commas():
    assert resolve("x", "a:1, b", {}) == (Endpoint("a", 1), Endpoint("b", 9090))


@pytest.mark.parametrize("text", ["h:1", "dns:///h:1", "grpc://h:1", "http://h:1/"])
def test_addresses_are_taken_as_other_tools_write_them(text):
    assert parse_endpoint(text) == Endpoint("h", 1)


@pytest.mark.parametrize("text", ["https://h:1", "grpcs://h:1/"])
def test_an_address_may_ask_for_tls(text):
    assert parse_endpoint(text) == Endpoint("h", 1, tls=True)


def test_ipv6_addresses_have_brackets():
    assert str(parse_endpoint("[::1]:5")) == "[::1]:5"


@pytest.mark.parametrize("text", ["h:0", "h:99999", "a b", "h:port", "::1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AddressError, match="HOST:PORT"):
        parse_endpoint(text)


def test_a_repository_needs_an_address():
    with pytest.raises(AddressError, match="MODELCACHE_ADDRESS"):
        resolve("google-bert/bert-base-uncased", None, {})


@pytest.mark.parametrize("name", ["Bert", "bert_base", "a" * 41])
def test_what_cannot_be_a_modelcache_is_refused(name):
    with pytest.raises(AddressError, match="not the name of a ModelCache"):
        resolve(name, None, {})
