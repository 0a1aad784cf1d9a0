"""Engines of the sampler: time, ratios, floors, memory; each against the naive model's own draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from bench import registry
from bench.cases import SAMPLER_CASES, Case
from bench.engines import request_of
from bench.sampler import check_codes, measure_memory, naive_pace, torch_steps
from fastvq import _engine, sample

CASES = {case.id: case for case in SAMPLER_CASES}


@registry.contest("sampling", "default call", "pipeline call")
def test_sampler(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@registry.contest("row product")
def test_row_product(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@pytest.mark.skipif(not _engine.available(), reason="the cpu engine needs the extension")
def test_memory_of_a_fresh_process() -> None:
    # At full size: what the libraries take for themselves on first use is larger than a small twin's caches.
    memory = measure_memory(CASES["small-strict-bottom-b32"])
    assert 0.75 * memory.predicted < memory.measured < 1.5 * memory.predicted


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["small-strict-top-b8", "default-inclusive-bottom-b32"])
def test_extrapolations_are_labelled(name: str) -> None:
    case = dataclasses.replace(CASES[name].small(), naive_batch=2)
    prior = case.prior()
    request = request_of(prior, case.batch, case.inputs(prior))
    naive, cached = naive_pace(case, prior, request, 1).entry(), torch_steps(prior, request, 1)
    for entry in (naive, cached):
        assert entry.extrapolated
        assert entry.comparable
        assert entry.median > 0
    assert f"at batch 2, times {case.batch / 2:g}" in str(naive.extrapolated)
    assert cached.check is not None
    assert cached.check.facts["positions"] == case.batch * 3 * prior.config.shape[1]


@pytest.mark.usefixtures("threads")
def test_check_finds_a_wrong_code() -> None:
    case = CASES["digits-bottom-b8"]
    prior = case.prior()
    inputs = case.inputs(prior)
    codes = sample(prior, case.batch, **inputs, engine="naive", micro_batch=case.batch)
    request = request_of(prior, case.batch, inputs)
    assert check_codes(prior, request, codes).passed
    assert check_codes(prior, request, codes[:, :2], samples=2).passed
    codes[3, 2, 1] = (codes[3, 2, 1] + 1) % prior.config.num_codes
    check = check_codes(prior, request, codes)
    assert not check.passed
    assert check.facts["outside"] >= 1
