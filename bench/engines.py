"""All that the benchmarks know of the inside of the sampler's engines: phases, single rows, and filled caches."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill, plan_of, static_inputs
from fastvq.sampling.engines.context import fixed_statics
from fastvq.sampling.engines.cpu import CpuPlan
from fastvq.sampling.engines.pytorch import TorchGrid, TorchPlan, front_of, sample_torch
from fastvq.sampling.request import SampleRequest, Settings, build_request


class _EnoughError(Exception):
    """Raised to leave an engine after some rows."""


def request_of(prior: Prior, batch: int, inputs: dict[str, Any], **changes: Any) -> SampleRequest:
    """What :func:`fastvq.sample` makes of its arguments."""
    rest: dict[str, Any] = {"noise": None, "init_codes": None, "mask": None, "start": 0, **changes}
    return build_request(prior, batch, settings=Settings(), **inputs, **rest)


def cpu_logits(prior: Prior, request: SampleRequest, *, bf16: bool) -> Tensor:
    """The ``cpu`` engine's logits at all positions, [n, H, W, K]."""
    plan = plan_of(prior)
    logits = torch.empty(*request.noise.shape, plan.num_codes)
    with torch.inference_mode():
        CpuPlan(plan, bf16=bf16).fill(
            request,
            fixed_statics(prior, request),
            plan.front(plan.shape[1]),
            lambda *_: None,
            threads=torch.get_num_threads(),
            logits=logits,
        )
    return logits


def row_phase_seconds(name: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> float:
    """Seconds that an engine spends on whole rows; 0 for one without such a phase."""
    spent = {"row phase": 0.0, "step phase": 0.0}

    def add(phase: str, seconds: float) -> None:
        spent[phase] += seconds

    fill(name, prior, request, lambda *_: None, options, on_phase=add)
    return spent["row phase"]


def fill_rows(
    name: str, prior: Prior, request: SampleRequest, count: int, options: EngineOptions | None = None
) -> list[float]:
    """When each of the first ``count`` rows was done, the start before them all."""
    ticks = [time.perf_counter()]

    def row_done(rows: int, codes: Tensor) -> None:
        # Rows of one call were done together.
        ticks.extend([time.perf_counter()] * rows)
        if len(ticks) > count:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        fill(name, prior, request, row_done, options or EngineOptions())
    return ticks


class TorchSteps:
    """The ``torch`` engine by steps of its front: the first rows sampled, and any step alone with caches full of noise.

    Attributes:
        codes: of the first rows, three or more.
        chosen: steps spread over the grid.
    """

    def __init__(self, prior: Prior, request: SampleRequest) -> None:
        self.request, self.device = request, request.noise.device
        weights = TorchPlan(plan_of(prior), self.device)
        front = front_of(weights.plan, None)
        self.grid = TorchGrid(weights, front, len(request.noise), static_inputs(prior, request))
        done = 0

        def row_done(rows: int, codes: Tensor) -> None:
            nonlocal done
            done += rows
            if done >= 3:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            sample_torch(self.grid, request, row_done)
        self.codes = self.grid.codes[:, :done].clone()
        self.steps = front.steps
        self.chosen = sorted({round(step) for step in np.linspace(0, front.steps - 1, 5)})
        # What the caches hold does not change the amount of work, so a step in the middle needs no steps before it.
        for store in (store for stores in self.grid.stores.values() for store in stores):
            store.grid.normal_()
        self.grid.codes.random_(weights.plan.num_codes)

    def begin(self, step: int) -> None:
        """Its row phase."""
        self.grid.begin(step)

    def turns(self, *, checked: bool = True) -> None:
        """The rest of the step begun last; unless ``checked`` without looking at logits on the host."""
        tile, codes = self.grid.tile, self.grid.codes
        for turn in tile.turns:
            logits, at = self.grid.logits(turn), tile.at(turn)
            if checked:
                self.request.draw_at(codes, logits, at)
            else:
                codes[at] = _draw_unchecked(logits, self.request.noise[at])


def _draw_unchecked(logits: Tensor, uniforms: Tensor) -> Tensor:
    """What `draw` gives for logits that are finite."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = weights.cumsum(-1).masked_fill(weights == 0, 0.0)
    return (sums > uniforms.unsqueeze(-1) * sums.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
