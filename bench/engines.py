"""All that the benchmarks know of the inside of the sampler's engines: phases, single rows, and filled caches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from bench.harness import timed
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill, plan_of, static_inputs
from fastvq.sampling.engines.pytorch import TorchStep, sample_torch
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.request import SampleRequest, Settings, build_request


class _EnoughError(Exception):
    """Raised to leave an engine after some rows."""


def request_of(prior: Prior, batch: int, inputs: dict[str, Any]) -> SampleRequest:
    """What :func:`fastvq.sample` makes of its arguments."""
    rest: dict[str, Any] = {"noise": None, "init_codes": None, "mask": None, "start": 0}
    return build_request(prior, batch, settings=Settings(), **inputs, **rest)


def row_phase_seconds(name: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> float:
    """Seconds that an engine spends on whole rows; 0 for one without such a phase."""
    spent = {"row phase": 0.0, "step phase": 0.0}

    def add(phase: str, seconds: float) -> None:
        spent[phase] += seconds

    fill(name, prior, request, lambda: None, options, on_phase=add)
    return spent["row phase"]


def fill_rows(
    name: str, prior: Prior, request: SampleRequest, count: int, options: EngineOptions | None = None
) -> list[float]:
    """When each of the first ``count`` rows was done, the start before them all."""
    ticks = [time.perf_counter()]

    def row_done() -> None:
        ticks.append(time.perf_counter())
        if len(ticks) > count:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        fill(name, prior, request, row_done, options or EngineOptions())
    return ticks


@contextlib.contextmanager
def touched_caches() -> Iterator[None]:
    """Caches made inside the block are written once in full: pages that nobody has written to are not resident."""
    init = GridState.__init__

    def touched(state: GridState, *arguments: Any) -> None:
        init(state, *arguments)
        for cache in (*(ring.data for ring in state.rings.values()), *state.keys.values(), *state.values.values()):
            cache.zero_()

    with mock.patch.object(GridState, "__init__", touched):
        yield


class TorchRows:
    """The ``torch`` engine row by row: the first three sampled, and any other alone with caches full of noise."""

    def __init__(self, prior: Prior, request: SampleRequest) -> None:
        self.request, self.device = request, str(request.noise.device)
        compiled = CompiledPlan(plan_of(prior), request.noise.device)
        self.step = TorchStep(compiled)
        self.state = GridState(compiled, request.noise.shape[0], static_inputs(prior, request))
        done: list[int] = []

        def row_done() -> None:
            done.append(len(done))
            if len(done) == 3:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            sample_torch(compiled, self.step, self.state, request, row_done)
        self.codes = self.state.codes[:, : len(done)].clone()
        # What the caches hold does not change the amount of work, so a row in the middle needs no rows before it.
        for ring in self.state.rings.values():
            ring.data.normal_()
        for cache in (*self.state.keys.values(), *self.state.values.values()):
            cache.normal_()
        self.state.codes.random_(compiled.plan.num_codes)

    def seconds(self, row: int) -> tuple[float, float]:
        """Of a row's phase, and of its steps."""
        begin = timed(self.state.begin_row, row, device=self.device)
        width = self.state.codes.shape[2]
        return begin, timed(torch_row, self.step, self.state, self.request, row, width, device=self.device)


def torch_row(step: TorchStep, state: GridState, request: SampleRequest, row: int, width: int) -> None:
    for column in range(width):
        drawn = draw(step.logits(state, row, column), request.noise[:, row, column], backend="torch")
        known = request.known[:, row, column]
        state.codes[:, row, column] = torch.where(known, request.init_codes[:, row, column], drawn)
