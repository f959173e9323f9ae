"""`modelcache-operator --check`: what `helm test` runs."""

import asyncio

import pytest

from modelcache_operator import rights
from modelcache_operator.settings import Settings

SETTINGS = Settings(image="i", namespaces=("a",), operator_namespace="system", lease_name="lease")


class Account:
    """An account that is allowed what the operator needs, but for what is taken away or given besides."""

    def __init__(self, *, without=None, besides=None):
        self.without, self.besides = without, besides

    async def review(self, attributes):
        right = rights.Right(attributes["group"], attributes["resource"], attributes["verb"], attributes["subresource"])
        if right == self.without:
            return False
        if right in rights.LEASE:
            named = attributes["name"] == ("" if right.verb == "create" else "lease")
            return attributes["namespace"] == "system" and named
        return attributes["namespace"] == "a" and (right in rights.NEEDED or right == self.besides)


def problems(**account):
    return asyncio.run(rights.problems(Account(**account), SETTINGS))


def test_the_rights_that_the_chart_gives_are_no_problem():
    assert problems() == []


@pytest.mark.parametrize("right", [*rights.NEEDED, *rights.LEASE], ids=str)
def test_each_right_that_is_missing_is_named(right):
    [problem] = problems(without=right)
    assert problem.startswith(f"not allowed, but needed: {right}")
    assert ("for lease in namespace system" in problem) is (right in rights.LEASE)


@pytest.mark.parametrize("right", rights.FORBIDDEN, ids=str)
def test_each_right_that_is_too_much_is_named(right):
    assert problems(besides=right) == [f"allowed, but must not be: {right} in namespace a"]
