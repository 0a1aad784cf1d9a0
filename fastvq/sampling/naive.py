"""The naive sampler: the definition of sampling that every other engine is measured against.

For each position in raster order the whole network runs on the rows so far; the logits there, tempered and filtered,
are turned into a code by inverse CDF at the position's uniform number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling.request import SampleRequest


@torch.inference_mode()
def sample_naive(prior: Prior, request: SampleRequest, row_done: Callable[[], None]) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]."""
    codes = request.start_codes()
    batch, height, width = codes.shape
    context = prior.context(request.condition, request.label, batch=batch)
    for row in range(height):
        for column in range(width):
            if not bool(request.known[:, row, column].all()):
                logits = prior.logits(codes[:, : row + 1], context)[:, :, row, column]
                request.draw_into(codes, logits, row, column)
        row_done()
    return codes
