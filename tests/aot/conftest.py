"""Skips what is marked `aot` where there is nothing to compile with."""

import pytest

from . import harness


def pytest_runtest_setup(item):
    if item.get_closest_marker("aot") and (reason := harness.missing()):
        pytest.skip(reason)
