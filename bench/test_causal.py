"""Causal convolution, attention, gated blocks, priors: time, ratios, floors; all checked in the same run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.causal import Convolution, run_case, run_prior_case
from bench.causal_cases import CAUSAL_CASES, CAUSAL_GPU_CASES, PRIOR_CASES, PRIOR_GPU_CASES, CausalCase, PriorCase
from bench.harness import Recorder, Result
from bench.machine import GPU_UNITS

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def threads(recorder: Recorder) -> Iterator[None]:
    """One thread in the smoke run: on tensors this small more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if recorder.quick else before)
    yield
    torch.set_num_threads(before)


def _finish(result: Result, recorder: Recorder, device: str) -> None:
    recorder.results.append(result)
    if not recorder.quick:
        recorder.ceilings.measure_gemm()
        for unit in GPU_UNITS if device == "cuda" else ():
            recorder.ceilings.measure_gpu(unit, 8192, 8192, 8192)
    assert result.entry("fastvq") is not None
    for entry in result.entries:
        assert entry.check is not None
        assert entry.check.passed, f"{entry.peer}: {entry.check.summary}"


@pytest.mark.parametrize("case", [*CAUSAL_CASES, *(CAUSAL_GPU_CASES if GPU else [])], ids=lambda case: case.id)
def test_causal(case: CausalCase, recorder: Recorder) -> None:
    recorder.log(case.id)
    _finish(run_case(case.small() if recorder.quick else case, recorder), recorder, case.device)


@pytest.mark.parametrize("case", [*PRIOR_CASES, *(PRIOR_GPU_CASES if GPU else [])], ids=lambda case: case.id)
def test_causal_prior(case: PriorCase, recorder: Recorder) -> None:
    recorder.log(case.id)
    _finish(run_prior_case(case.small() if recorder.quick else case, recorder), recorder, case.device)


def test_causal_case_ids_are_unique() -> None:
    ids = [case.id for case in (*CAUSAL_CASES, *CAUSAL_GPU_CASES, *PRIOR_CASES, *PRIOR_GPU_CASES)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["out", "x", "weight"])
def test_causal_check_finds_what_is_wrong(index: int) -> None:
    case = next(c for c in CAUSAL_CASES if c.what != "forward" and c.operation == "causal conv").small()
    problem = Convolution(case)
    (run,) = problem.contenders(tuned=False)["fastvq"]
    outputs = run()
    assert problem.check(outputs).passed
    outputs[index] = outputs[index].clone()
    outputs[index][0, 0, 0, 0] += 0.01 * outputs[index].abs().max()
    assert not problem.check(outputs).passed
