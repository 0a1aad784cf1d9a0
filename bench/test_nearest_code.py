"""Nearest code and its EMA statistics: time, ratios, floors, memory; all against float64."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import pytest
import torch

from bench import nearest_code, registry
from bench.cases import Case, case_of, nearest_code_case
from bench.groups import run_case
from bench.harness import Recorder
from bench.nearest_code import NearestCode, measure_memory
from bench.peers.nearest_code import TILES, Fastvq, chunked, tiled

CASE = nearest_code_case(389, 61, 9, "forward + EMA")
pytestmark = pytest.mark.usefixtures("threads")


@registry.contest("nearest code", "quantiser module")
def test_nearest_code(case: Case, name: str, contest: Callable[[Case, str], None]) -> None:
    contest(case, name)


@pytest.mark.parametrize("what", ["indices", "averages"])
def test_check_finds_what_is_wrong(what: str) -> None:
    contender = Fastvq(NearestCode(CASE, tuned=False))
    contender.prepare()
    indices = contender.run()
    assert contender.problem.check(contender, indices).passed
    averages = contender.averages()
    assert averages is not None
    if what == "indices":
        indices[0] = (indices[0] + 1) % CASE.num_codes
        check = contender.problem.check(contender, indices)
        assert check.facts["differ"] == 1
        assert check.facts["worst_gap"] > nearest_code.GAP
    else:
        # One vector of one code is missing in what the sums became.
        averages.embedding_sum[indices[5]] -= 0.01 * contender.x[5]
        check = contender.problem.check(contender, indices)
        assert check.facts["averages_error"] > nearest_code.AVERAGES_ERROR
    assert not check.passed


def test_check_refuses_indices_beyond_the_codebook() -> None:
    contender = Fastvq(NearestCode(CASE, tuned=False))
    contender.prepare()
    indices = contender.run()
    for wrong in (indices[:-1], indices + CASE.num_codes, indices - CASE.num_codes):
        assert not contender.problem.check(contender, wrong).passed


@pytest.mark.parametrize("kind", ["chunked", "tiled"])
def test_every_form_of_a_peer_finds_the_same_codes(kind: str) -> None:
    problem = NearestCode(nearest_code_case(1003, 1500, 9, "forward"), tuned=False)
    contender = chunked(problem, (1, 7, 1003)) if kind == "chunked" else tiled(problem, (*TILES, (7, 11)))
    expected = Fastvq(problem, backend="torch").run()
    assert len(contender.forms) == 6
    for form in contender.forms:
        contender.form = form
        assert torch.equal(contender.run(), expected)


def test_inputs_change_from_run_to_run_and_the_codebook_does_not() -> None:
    contender = Fastvq(NearestCode(CASE, tuned=False))
    seen = []
    for _ in range(2):
        contender.prepare()
        averages = contender.averages()
        assert averages is not None
        assert torch.equal(averages.embedding, contender.problem.codebook)
        contender.run()
        assert not torch.equal(averages.embedding, contender.problem.codebook)
        seen.append(contender.x)
    assert not torch.equal(*seen)


def test_hopeless_peers_are_left_out_with_the_reason(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nearest_code.MOST_BYTES, "cpu", 1e4)
    recorder = Recorder(quick=True, log=recorder.log)
    result = run_case(CASE, recorder)
    assert result.left_out["eager"].endswith("GB for N x K, limit 0")
    assert result.entry("eager") is None
    assert result.entry("fastvq") is not None
    assert result.entry("chunked addmm") is not None


def test_what_the_machine_cannot_hold_is_left_out(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = 4 * CASE.scores
    monkeypatch.setattr(nearest_code, "available_memory", lambda: 2 * scores - 2)
    assert run_case(CASE, Recorder(quick=True, log=recorder.log)).left_out["eager"].endswith("GB for N x K, limit 0")
    monkeypatch.setattr(nearest_code, "available_memory", lambda: 2 * scores + 2)
    assert "eager" not in run_case(CASE, Recorder(quick=True, log=recorder.log)).left_out


def test_missing_libraries_are_left_out_and_named(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    names = ("vector_quantize_pytorch", "faiss")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in names else find(name, *rest))
    for name in names:
        # Importing it fails, as if it were not there.
        monkeypatch.setitem(sys.modules, name, None)
    result = run_case(nearest_code_case(77, 13, 5, "forward"), Recorder(quick=True, log=recorder.log))
    assert result.left_out == {
        "vector-quantize-pytorch": "vector-quantize-pytorch is not installed",
        "faiss-cpu": "faiss-cpu is not installed",
    }
    assert result.entry("fastvq") is not None


def test_memory_of_a_fresh_process() -> None:
    case = case_of("n4096-k512-d64-forward")
    # All scores of 4096 vectors and 512 codes, in float32.
    scores = 4 * case.scores
    assert 0.9 * scores < measure_memory(case, "eager").measured < 2 * scores
