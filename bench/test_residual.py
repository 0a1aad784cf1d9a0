"""Residual quantisation: training forward of all levels; codes against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import registry
from bench.cases import Case, case_of
from bench.registry import contender
from bench.residual import Residuals

pytestmark = pytest.mark.usefixtures("threads")


@registry.contest("residual quantiser")
def test_residual(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@pytest.mark.parametrize("level", [0, 2])
def test_check_finds_a_wrong_code(level: int) -> None:
    problem = Residuals(case_of("residual-n12288-k1024-d128-q8").small(), tuned=False)
    one = contender(problem, "fastvq")
    (form,) = one.warm()
    form.prepare()
    codes = form.run()
    assert isinstance(one.x, type(codes))
    assert problem.check(one, codes).passed
    codes[5, level] = (codes[5, level] + 1) % problem.case.num_codes
    assert not problem.check(one, codes).passed


def test_a_run_starts_from_the_first_codebooks() -> None:
    problem = Residuals(case_of("residual-n12288-k1024-d128-q8").small(), tuned=False)
    one = contender(problem, "fastvq")
    (form,) = one.warm()
    form.prepare()
    first = form.run()
    for _ in range(len(problem.inputs)):
        form.prepare()
    assert form.run().equal(first)
