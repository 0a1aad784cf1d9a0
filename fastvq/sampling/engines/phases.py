"""How long the phases of filling a grid take, for callers that ask."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from fastvq import _nvtx

OnPhase = Callable[[str, float], None]


class Phases:
    """The phases of one grid. Where nobody asks for their time, they are named ranges for profilers and no more.

    Work on a GPU is timed there, by events on its current stream, and reported at the end of the grid; on a CPU each
    phase is reported when it ends.
    """

    def __init__(self, on_phase: OnPhase | None, device: torch.device) -> None:
        self._on_phase, self._device = on_phase, device
        self._waiting: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def phase(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A block that is such a phase."""
        if self._on_phase is None:
            return _nvtx.annotate(name)
        return self._timed(name, self._on_phase)

    @contextlib.contextmanager
    def _timed(self, name: str, on_phase: OnPhase) -> Iterator[None]:
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            with _nvtx.annotate(name):
                yield
            end.record(stream)
            self._waiting.append((name, start, end))
            return
        began = time.perf_counter()
        with _nvtx.annotate(name):
            yield
        on_phase(name, time.perf_counter() - began)

    def finish(self) -> None:
        """Report what is still to be reported; waits for the last phase."""
        if self._on_phase is None:
            return
        for name, start, end in self._waiting:
            end.synchronize()
            self._on_phase(name, start.elapsed_time(end) / 1000)
        self._waiting.clear()
