"""Causal convolution, attention, gated blocks, priors: time, ratios, floors; all checked in the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import registry
from bench.cases import CASES, Case
from bench.causal import Convolution
from bench.registry import contender


@registry.contest("causal conv", "gated block", "causal attention")
def test_causal(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@registry.contest("causal prior")
def test_causal_prior(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


def test_case_ids_are_unique() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["out", "x", "weight"])
def test_causal_check_finds_what_is_wrong(index: int) -> None:
    case = next(c for c in CASES if c.operation == "causal conv" and c.id.endswith("backward-b8")).small()
    problem = Convolution(case, tuned=False)
    one = contender(problem, "fastvq")
    (form,) = one.warm()
    outputs = form.run()
    assert problem.check(one, outputs).passed
    outputs[index] = outputs[index].clone()
    outputs[index][0, 0, 0, 0] += 0.01 * outputs[index].abs().max()
    assert not problem.check(one, outputs).passed
