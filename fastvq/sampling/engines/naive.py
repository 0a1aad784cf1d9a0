"""The naive sampler: the definition of sampling that every other engine is measured against.

For each position in raster order the whole network runs on the rows so far; the logits there, tempered and filtered,
are turned into a code by inverse CDF at the position's uniform number.
"""

from __future__ import annotations

from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.request import SampleRequest


class NaiveEngine(Engine[None]):
    name = "naive"
    micro_batch = 8

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> None:
        pass

    def fill(
        self, prepared: None, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        codes = request.start_codes()
        batch, height, width = codes.shape
        context = prior.context(request.condition, request.label, batch=batch)
        for row in range(height):
            for column in range(width):
                if not bool(request.known[:, row, column].all()):
                    logits = prior.logits(codes[:, : row + 1], context)[:, :, row, column]
                    request.draw_into(codes, logits, row, column)
            row_done(1, codes)
        return codes
