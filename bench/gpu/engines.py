"""What the sampler's benchmark needs of engines beyond their calls; no other file here knows what they are made of."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.gpu.clock import clock
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import plan_of, static_inputs
from fastvq.sampling.request import SampleRequest
from fastvq.sampling.state import CompiledPlan, GridState
from fastvq.sampling.torch_engine import TorchStep


class Rows:
    """Rows of a grid one at a time, as the ``torch`` engine fills them, in whatever order."""

    def __init__(self, prior: Prior, request: SampleRequest, options: EngineOptions | None = None) -> None:
        kernel = (options or EngineOptions()).row_kernel
        self.request, self.compiled = request, CompiledPlan(plan_of(prior), request.noise.device, kernel)
        self.state = GridState(self.compiled, len(request.noise), static_inputs(prior, request))
        self.height, self.width = self.compiled.plan.shape

    @functools.cached_property
    def step(self) -> TorchStep:
        return TorchStep(self.compiled)

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
            logits, uniforms = self.step.logits(self.state, row, column), self.request.noise[:, row, column]
            drawn = draw(logits, uniforms, backend="torch") if checked else _draw_unchecked(logits, uniforms)
            known = self.request.known[:, row, column]
            self.state.codes[:, row, column] = torch.where(known, self.request.init_codes[:, row, column], drawn)


def _draw_unchecked(logits: Tensor, uniforms: Tensor) -> Tensor:
    """What `draw` gives for logits that are finite."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    sums = weights.cumsum(-1).masked_fill(weights == 0, 0.0)
    return (sums > uniforms.unsqueeze(-1) * sums.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


@torch.inference_mode()
def phase_seconds(engine: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> dict[str, float]:
    """Seconds of the device in each phase that can be told: all rows' row phases, with no steps in between."""
    rows = Rows(prior, request, options)
    rows.scatter()
    rows.begin(0)
    rows.begin(1)
    rest = range(min(2, rows.height - 1), rows.height)
    timed = clock(lambda: [rows.begin(row) for row in rest], device=request.noise.device)
    return {"row phase": timed.device_seconds * rows.height / len(rest)}
