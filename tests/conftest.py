"""Fixtures shared by the tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# Jobs in the background of a shell begin with Ctrl-C ignored, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def steady() -> Iterator[None]:
    """A fixed seed, and one thread: on tensors this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
