"""When waiting ends, and what is said until then."""

import argparse

import pytest

from modelcache_cli.commands.wait import _lack
from modelcache_volume.v1.manifest_pb2 import Active

ACTIVE = Active(name="m", requested="main", commit="c0ffee" * 6 + "abcd", digest="ab" * 32)


def lack(**wanted) -> str | None:
    return _lack(ACTIVE, argparse.Namespace(**{"revision": None, "digest": None, **wanted}), "host:9090")


@pytest.mark.parametrize(
    "wanted",
    [{}, {"revision": "main"}, {"revision": "c0ffeec"}, {"revision": ACTIVE.commit}, {"digest": "ab" * 6}],
)
def test_what_is_wanted_is_active(wanted):
    assert lack(**wanted) is None


@pytest.mark.parametrize("wanted", [{"revision": "mai"}, {"revision": "c0ffee"}, {"revision": "c0ffeed"}])
def test_another_revision_is_named(wanted):
    assert lack(**wanted) == f"host:9090 still serves the revision main = c0ffeec0ffee, not {wanted['revision']}"


def test_another_digest_is_named():
    assert lack(digest="ab" * 4 + "00" * 28) == "host:9090 still serves the digest abababababab, not abababab0000"
