"""Fixtures shared by the tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Jobs in the background of a shell begin with Ctrl-C ignored, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` files that do not speak of one are not imported, which takes most of the time."""
    chosen = config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py"
    return True if chosen and "gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def steady(one_thread: None) -> None:
    """A fixed seed, and one thread: on tensors this small more threads only wait for each other."""
    torch.manual_seed(0)
