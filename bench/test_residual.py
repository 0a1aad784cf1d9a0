"""Residual quantisers: time, ratios, floors; all against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import registry, residual
from bench.cases import Case, case_of
from bench.nearest_code import AVERAGES_ERROR, GAP
from bench.peers.residual import Fastvq, InTurn
from bench.residual import Residual

pytestmark = pytest.mark.usefixtures("threads")


@registry.contest("residual quantiser")
def test_residual(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


def problem(what: str = "training") -> Residual:
    return Residual(case_of(f"residual-n12288-k256-d64-q8-{what}").small(), tuned=False)


@pytest.mark.parametrize("what", ["indices", "averages", "shape"])
def test_check_finds_what_is_wrong(what: str) -> None:
    contender = Fastvq(problem())
    contender.prepare()
    indices = contender.run()
    assert contender.problem.check(contender, indices).passed
    if what == "indices":
        indices[:, 1] = (indices[:, 1] + 1) % contender.case.num_codes
        assert contender.problem.check(contender, indices).facts["worst_gap"] > GAP
    elif what == "averages":
        # One vector of one code is missing in what the sums of a level became.
        contender.buffers()[1].embedding_sum[indices[5, 1]] -= 0.01 * contender.x[5].detach()
        assert contender.problem.check(contender, indices).facts["averages_error"] > AVERAGES_ERROR
    else:
        indices = indices[:, :2]
    assert not contender.problem.check(contender, indices).passed


@pytest.mark.parametrize("what", ["training", "encode"])
def test_levels_in_turn_find_the_same(what: str) -> None:
    shared = problem(what)
    one, other = Fastvq(shared), InTurn(shared)
    for contender in (one, other):
        contender.prepare()
    assert torch.equal(one.run(), other.run())
    for have, want in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(have.embedding, want.embedding)


def test_worst_gap_is_in_units_of_rounding() -> None:
    x, codebook = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert residual.worst_gap(x, codebook, torch.tensor([0])) == 0
    # (3 - 1)^2 more, over u (1 + 3)^2.
    assert residual.worst_gap(x, codebook, torch.tensor([1])) == pytest.approx(4 / 16 * 2**24)
