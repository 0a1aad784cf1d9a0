"""Drawing codes in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address
from fastvq.ops.dispatch import memory_reason
from fastvq.ops.draw.options import DrawOptions
from fastvq.ops.draw.reference import raise_bad_row


def why_not(logits: Tensor) -> str | None:
    return memory_reason(logits) or _engine.why_unavailable()


@torch.no_grad()
def draw_cpp(logits: Tensor, uniforms: Tensor, options: DrawOptions) -> Tensor:
    extension = _engine.require()
    values, points = logits.float().contiguous(), uniforms.contiguous()
    num_codes = values.shape[-1]
    tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=logits.device)
    rows = tokens.numel()
    bad_row = extension.draw(
        address("logits", values, torch.float32, rows * num_codes),
        address("uniforms", points, torch.float32, rows),
        address("tokens", tokens, torch.int64, rows),
        rows,
        num_codes,
        options.temperature,
        num_codes if options.top_k is None else options.top_k,
        1.0 if options.top_p is None else options.top_p,
    )
    if bad_row >= 0:
        raise_bad_row(logits, uniforms, bad_row)
    return tokens
