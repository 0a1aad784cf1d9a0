"""Drawing codes in plain PyTorch: the definition, and what runs where no kernel does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.ops.draw.options import DrawOptions


@torch.no_grad()
def draw_torch(logits: Tensor, uniforms: Tensor, options: DrawOptions) -> Tensor:
    values = logits.float()
    peak = values.amax(-1, keepdim=True)
    check_rows(logits, uniforms, peak)
    # The maximum is taken away before the division, so that a small temperature cannot overflow.
    weights = ((values - peak) / options.temperature).exp()
    if options.top_k is not None or options.top_p is not None:
        order = values.argsort(dim=-1, descending=True, stable=True)[..., : options.top_k]
        ranked = weights.gather(-1, order)
        if options.top_p is not None:
            sums = ranked.cumsum(-1)
            # A code is kept while the sum of those before it has not reached top_p; the first always is.
            reached = sums[..., :-1] >= options.top_p * sums[..., -1:]
            ranked[..., 1:].masked_fill_(reached, 0.0)
        weights = torch.zeros_like(weights).scatter(-1, order, ranked)
    # A parallel sum on a GPU may grow where the weight is 0 and end below its own maximum. Neither may lead to a code
    # of probability 0 or to none.
    sums = weights.cumsum(-1).masked_fill(weights == 0, 0.0)
    target = uniforms.unsqueeze(-1) * sums.amax(-1, keepdim=True)
    return (sums > target).to(torch.uint8).argmax(-1)


def check_rows(logits: Tensor, uniforms: Tensor, peak: Tensor) -> None:
    """The maximum of a row tells all: NaN and +inf come through, and it is -inf only if every logit is."""
    bad = ~(peak.squeeze(-1).isfinite() & (uniforms >= 0) & (uniforms < 1))
    if bad.any():
        raise_bad_row(logits, uniforms, int(bad.flatten().to(torch.uint8).argmax()))


def raise_bad_row(logits: Tensor, uniforms: Tensor, row: int) -> None:
    index: tuple[int, ...] = ()
    for size in reversed(uniforms.shape):
        row, place = divmod(row, size)
        index = (place, *index)
    where = f" at index {list(index)}" if index else ""
    u, values = float(uniforms[index]), logits[index].float()
    if not 0 <= u < 1:
        raise ArgumentError(f"uniforms: expected values in [0, 1), got {u!r}{where}")
    if values.isnan().any():
        found = "NaN"
    elif (values == math.inf).any():
        found = "+inf"
    else:
        found = "-inf for every code"
    raise ArgumentError(f"logits: expected finite values, or -inf to exclude some of the codes, got {found}{where}")
