"""Ctrl-C and SIGTERM between two steps rather than in the middle of one."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastvq.errors import Terminated


class DeferredInterrupt:
    """While active, the first Ctrl-C or SIGTERM sets ``requested``; the second one interrupts at once.

    In any other thread than the main one, where signals do not arrive, it does nothing.

    Args:
        repeated: seconds in which a further signal is taken for the same one. A launcher of several processes passes on
            what the system has sent to each of them already.

    Attributes:
        requested: what to raise after the current step, or None.
    """

    def __init__(self, repeated: float = 0.0) -> None:
        self.requested: type[KeyboardInterrupt] | None = None
        self._repeated, self._at = repeated, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.requested:
            if time.monotonic() - self._at < self._repeated:
                return
            raise kind
        self.requested, self._at = kind, time.monotonic()
        again = "another SIGTERM stops" if kind is Terminated else "press Ctrl-C again to stop"
        print(f"\nstopping after this step; {again} at once", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
