"""What engines tell of the time that their phases take."""

from __future__ import annotations

import time

import pytest
import torch
from cuda_stand_in import BATCH, Job
from engine_helpers import needs_extension, request_of, spread
from helpers import snail

from fastvq.sampling.engines import fill
from fastvq.sampling.engines.phases import Phases

pytestmark = pytest.mark.usefixtures("steady")
ROW = ["row phase", "step phase"]


@pytest.mark.parametrize(("engine", "times"), [("torch", 3), pytest.param("cpu", 1, marks=needs_extension)])
def test_every_row_or_grid_tells_of_both(engine: str, times: int) -> None:
    prior = spread(snail())
    request = request_of(prior, 2, {}, seed=0)
    told: list[tuple[str, float]] = []
    began = time.perf_counter()
    codes = fill(engine, prior, request, lambda *_: None, on_phase=lambda name, seconds: told.append((name, seconds)))
    assert sum(seconds for _, seconds in told) < time.perf_counter() - began
    assert [name for name, _ in told] == ROW * times
    assert all(seconds > 0 for _, seconds in told)
    assert torch.equal(codes, fill(engine, prior, request, lambda *_: None))


@needs_extension
def test_the_engine_for_gpus_tells_of_both() -> None:
    told: list[str] = []
    Job(spread(snail()), BATCH).run(on_phase=lambda name, _: told.append(name))
    assert told == ROW * 3


def test_the_naive_engine_has_no_phases() -> None:
    prior, told = spread(snail()), []
    fill(
        "naive",
        prior,
        request_of(prior, 2, {}, seed=0),
        lambda *_: None,
        on_phase=lambda name, _: told.append(name),
    )
    assert told == []


def test_a_phase_that_nobody_times_costs_no_object() -> None:
    phases = Phases(None, torch.device("cpu"))
    assert phases.phase("row phase") is phases.phase("row phase")
