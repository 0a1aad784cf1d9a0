"""A pytest plugin (``-p bench.gpu.deadline --start-within SECONDS``): tests that would start later are skipped."""

from __future__ import annotations

import time

import pytest

_START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--start-within", metavar="SECONDS", type=float, help="skip tests that would start later")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--start-within")
    if limit is not None and time.monotonic() - item.config.stash[_START] > limit:
        pytest.skip("out of time")
