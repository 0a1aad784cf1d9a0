"""Priors of other projects: their own samplers and ours; codes against the modules' own logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from bench import registry
from bench.cases import Case, case_of
from bench.own import OwnPrior
from bench.peers.own import Traced
from fastvq.errors import NaiveEngineWarning

pytestmark = pytest.mark.usefixtures("threads")
CASES = ("own-prior-gated-pixelcnn-b8", "own-prior-pixelsnail-b8")


@registry.contest("own prior")
def test_own_prior(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@pytest.mark.parametrize("name", CASES)
def test_check_finds_a_wrong_code(name: str) -> None:
    problem = OwnPrior(case_of(name).small(), tuned=False)
    contender = Traced(problem)
    with warnings.catch_warnings():
        # Without a plan there would be one.
        warnings.simplefilter("error", NaiveEngineWarning)
        codes = contender.run()
    assert problem.check(contender, codes).passed
    codes[1, 2, 1] = (codes[1, 2, 1] + 1) % problem.case.num_codes
    assert not problem.check(contender, codes).passed


@pytest.mark.parametrize("name", CASES)
def test_modules_are_causal(name: str) -> None:
    problem = OwnPrior(case_of(name).small(), tuned=False)
    generator = torch.Generator().manual_seed(0)
    codes, other = torch.randint(problem.case.num_codes, (2, 1, *problem.case.shape), generator=generator)
    mixed = codes.clone()
    mixed.flatten(1)[:, 7:] = other.flatten(1)[:, 7:]
    with torch.no_grad():
        logits, changed = (problem.module(one).flatten(2) for one in (codes, mixed))
    assert torch.allclose(logits[:, :, :8], changed[:, :, :8], atol=1e-6)
    assert not torch.allclose(logits[:, :, 8:], changed[:, :, 8:], atol=1e-3)
