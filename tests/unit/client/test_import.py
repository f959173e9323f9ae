"""The package can be imported where torch is not wanted, and quickly."""

import subprocess
import sys
import time

import pytest

import modelcache


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_it_imports_no_torch():
    loaded = run("import sys, modelcache; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy", "grpc", "pydantic"} & set(loaded)


def test_importing_it_takes_less_than_300_ms():
    def seconds(code):
        started = time.perf_counter()
        run(code)
        return time.perf_counter() - started

    assert min(seconds("import modelcache") - seconds("pass") for _ in range(3)) < 0.3


def test_files_are_read_without_torch():
    loaded = run("import sys; from modelcache import snapshot; print(*sys.modules)").split()
    assert "torch" not in loaded


def test_every_public_name_exists():
    assert all(getattr(modelcache, name) for name in modelcache.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modelcache.nothing
