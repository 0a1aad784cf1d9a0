"""A cap on the time of a block of code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class OutOfTimeError(BaseException):
    """Raised inside a block whose time is up. No library that is tolerant of exceptions should swallow it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Leave the block by `OutOfTimeError` after so many seconds; of the main thread, not one inside another.

    A call that does not return to Python, such as waiting for a GPU, is let finish.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: what is raised in a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
