"""A quantiser of another library, and the same after :func:`fastvq.accelerate`."""

from __future__ import annotations

import importlib.util

import fastvq
from bench.accelerated import NEEDS, Accelerated, Quantising, module_of
from bench.registry import LeftOutError, peer


def _made(problem: Accelerated) -> Quantising:
    module, package = NEEDS[problem.case.module]
    if importlib.util.find_spec(module) is None:
        raise LeftOutError(f"{package} is not installed")
    return Quantising(problem, module_of(problem.case))


@peer("accelerated quantiser", name="accelerated")
def accelerated(problem: Accelerated) -> Quantising:
    found = _made(problem)
    found.module = fastvq.accelerate(found.module)
    return found


@peer("accelerated quantiser", name="as it is")
def as_it_is(problem: Accelerated) -> Quantising:
    return _made(problem)
