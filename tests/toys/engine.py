"""An engine from outside the package: the prior's own modules over whole grids, as far as these have 3 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.models import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import Engine, OnPhase, RowDone
from fastvq.sampling.request import SampleRequest


class ToyEngine(Engine[int]):
    name = "toy"

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        rows = prior.config.shape[0]
        return None if rows == 3 else f"it fills grids of 3 rows, not of {rows}"

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> int:
        return batch

    def fill(
        self, prepared: int, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        codes = request.start_codes()
        context = prior.context(request.condition, request.label, batch=prepared)
        for row in range(codes.shape[1]):
            for column in range(codes.shape[2]):
                request.draw_into(codes, prior.logits(codes, context)[:, :, row, column], row, column)
            row_done(1, codes)
        return codes
