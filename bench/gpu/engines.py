"""What the sampler's benchmark needs of engines beyond their calls; no other file here knows what they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill, plan_of, static_inputs
from fastvq.sampling.engines.pytorch import TorchStep
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.request import SampleRequest


class Rows:
    """Rows of a grid one at a time, as the ``torch`` engine fills them, in whatever order."""

    def __init__(self, prior: Prior, request: SampleRequest) -> None:
        self.request, self.compiled = request, CompiledPlan(plan_of(prior), request.noise.device)
        self.step = TorchStep(self.compiled)
        self.state = GridState(self.compiled, len(request.noise), static_inputs(prior, request))
        self.height, self.width = self.compiled.plan.shape

    def scatter(self) -> None:
        """Random numbers wherever rows leave something, as if all rows had been filled; the work stays the same."""
        for ring in self.state.rings.values():
            ring.data.normal_()
        for cache in (*self.state.keys.values(), *self.state.values.values()):
            cache.normal_()
        self.state.codes.random_(self.compiled.plan.num_codes)

    def begin(self, row: int) -> None:
        """The row phase."""
        self.state.begin_row(row)

    def steps(self, row: int, *, checked: bool = True) -> None:
        """The step phase; unless ``checked`` without looking at logits on the host, which cannot be recorded."""
        for column in range(self.width):
            logits = self.step.logits(self.state, row, column)
            if checked:
                self.request.draw_into(self.state.codes, logits, row, column)
            else:
                self.state.codes[:, row, column] = _draw_unchecked(logits, self.request.noise[:, row, column])


def _draw_unchecked(logits: Tensor, uniforms: Tensor) -> Tensor:
    """What `draw` gives for logits that are finite."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = weights.cumsum(-1).masked_fill(weights == 0, 0.0)
    return (sums > uniforms.unsqueeze(-1) * sums.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def phase_seconds(engine: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> dict[str, float]:
    """Seconds of the device in each phase of a grid, all rows together."""
    spent: dict[str, float] = {}

    def on_phase(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + seconds

    fill(engine, prior, request, lambda: None, options, on_phase=on_phase)
    return spent
