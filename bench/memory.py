"""Peak memory of sampling a case with the ``cpu`` engine: ``python -m bench.memory CASE``, in a fresh process.

Prints ``{"measured": ..., "predicted": ...}``: the peak of resident bytes above those with the prior built and the
libraries warm, and what :func:`fastvq.sampling.describe` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from bench.cases import SAMPLER_CASES
from bench.sampler import request_of
from fastvq import PixelSNAIL, sample
from fastvq.sampling import describe
from fastvq.sampling.engines import fill
from fastvq.sampling.state import GridState

# The first row has no rows above it; in the second the row phase allocates all that it ever does.
_ROWS = 3


class _EnoughError(Exception):
    pass


def main(case_id: str, small: bool) -> None:
    case = next(case for case in SAMPLER_CASES if case.id == case_id)
    case = case.small() if small else case
    prior = case.prior()
    request = request_of(prior, case.batch, case.inputs(prior))
    warm = PixelSNAIL.from_preset("tiny-top").eval()
    sample(warm, 2, seed=0, micro_batch=2, engine="cpu")
    _return_freed_memory()
    # Resetting the high-water mark makes it that of sampling, whatever building the prior took.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    rows: list[int] = []

    def row_done() -> None:
        rows.append(len(rows))
        if len(rows) == _ROWS:
            raise _EnoughError

    with contextlib.suppress(_EnoughError), mock.patch.object(GridState, "__init__", _touching(GridState.__init__)):
        fill("cpu", prior, request, row_done)
    measured = _resident("VmHWM") - before
    print(json.dumps({"measured": measured, "predicted": describe(prior).memory(case.batch)}))


def _touching(init: Any) -> Any:
    """Caches are written once in full, because pages that nobody has written to do not count as resident."""

    def touched(state: GridState, *arguments: Any) -> None:
        init(state, *arguments)
        for cache in (*(ring.data for ring in state.rings.values()), *state.keys.values(), *state.values.values()):
            cache.zero_()

    return touched


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _return_freed_memory() -> None:
    """Otherwise sampling would fill what building the prior has left, and seem to need less."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main(sys.argv[1], "--small" in sys.argv[2:])
