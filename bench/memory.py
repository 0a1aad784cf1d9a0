"""Peak memory of one case in a fresh process: ``python -m bench.memory CASE [PEER] [--small]``.

Prints ``{"measured": ..., "predicted": ...}``. Of a sampler's case: the peak of resident bytes of the ``cpu`` engine
above those with the prior built and the libraries warm, and what :func:`fastvq.sampling.describe` says. Of a case of
nearest code: that of the peer above those with inputs and codebook, and no prediction.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from bench.cases import NEAREST_CODE_CASES, SAMPLER_CASES, NearestCodeCase, SamplerCase
from bench.nearest_code_contender import Contender, Problem, return_freed_memory
from bench.nearest_code_peers import factories
from bench.sampler import request_of
from fastvq import PixelSNAIL, sample
from fastvq.sampling import describe
from fastvq.sampling.engines import fill
from fastvq.sampling.engines.state import GridState

# The first row has no rows above it; in the second the row phase allocates all that it ever does.
_ROWS = 3


class _EnoughError(Exception):
    pass


def sampler_memory(case: SamplerCase) -> dict[str, int]:
    prior = case.prior()
    request = request_of(prior, case.batch, case.inputs(prior))
    warm = PixelSNAIL.from_preset("tiny-top").eval()
    sample(warm, 2, seed=0, micro_batch=2, engine="cpu")
    before = _start()
    rows: list[int] = []

    def row_done() -> None:
        rows.append(len(rows))
        if len(rows) == _ROWS:
            raise _EnoughError

    with contextlib.suppress(_EnoughError), mock.patch.object(GridState, "__init__", _touching(GridState.__init__)):
        fill("cpu", prior, request, row_done)
    return {"measured": _resident("VmHWM") - before, "predicted": describe(prior).memory(case.batch)}


def nearest_code_memory(case: NearestCodeCase, peer: str) -> dict[str, int | None]:
    warm = _contender(case.small(), peer)
    warm.prepare()
    warm.run()
    contender = _contender(case, peer)
    contender.prepare()
    before = _start()
    contender.run()
    return {"measured": _resident("VmHWM") - before, "predicted": None}


def _contender(case: NearestCodeCase, peer: str) -> Contender:
    problem = Problem(case, tuned=False, inputs=1)
    return next(make(problem) for name, _, make in factories(problem) if name == peer)


def _start() -> int:
    """Resident bytes now; the high-water mark becomes that of what follows, whatever preparing it took."""
    # Otherwise a run would fill what its preparation has left, and seem to need less.
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


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


def main(arguments: list[str]) -> None:
    small = "--small" in arguments
    case_id, *peer = (argument for argument in arguments if argument != "--small")
    cases: tuple[SamplerCase | NearestCodeCase, ...] = (*SAMPLER_CASES, *NEAREST_CODE_CASES)
    case = next(case for case in cases if case.id == case_id)
    case = case.small() if small else case
    print(json.dumps(sampler_memory(case) if isinstance(case, SamplerCase) else nearest_code_memory(case, *peer)))


if __name__ == "__main__":
    main(sys.argv[1:])
