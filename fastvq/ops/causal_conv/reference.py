"""Masked convolution in plain PyTorch: the definition, slow and differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.kernels.taps import read_taps
from fastvq.ops.grid import Form, Mask, Prologue


def causal_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Mask = "strict", form: Form = "rows"
) -> Tensor:
    """`fastvq.ops.causal_conv2d` in plain PyTorch, as a sum over the taps that are read: the definition.

    Args:
        x, weight, bias, mask, form: as of `fastvq.ops.causal_conv2d`.

    Returns:
        [B, O, H, W].
    """
    kernel = weight.shape[-1]
    height, width = x.shape[2:]
    taps = read_taps(kernel, mask, form)
    padded = F.pad(x, (taps.left, kernel - 1 - taps.left, taps.above, 0))
    out = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    for row in range(taps.above + 1):
        for column in range(kernel if row < taps.above else taps.current):
            shifted = padded[:, :, row : row + height, column : column + width]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, row, column], shifted)
    return out if bias is None else out + bias[:, None, None]


def fused_causal_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Mask = "strict",
    form: Form = "rows",
    activation: Prologue | None = None,
    context: Tensor | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`fastvq.ops.fused_causal_conv2d` in plain PyTorch, one step after the other: the definition.

    Args:
        x, weight, bias, mask, form, activation, context, gate, residual: as of `fastvq.ops.fused_causal_conv2d`.

    Returns:
        [B, O, H, W] or, with a gate, [B, O / 2, H, W].
    """
    out = causal_conv2d_reference(activate(x, activation), weight, bias, mask=mask, form=form)
    out = out if context is None else out + context
    out = F.glu(out, dim=1) if gate else out
    return out if residual is None else out + residual


def activate(x: Tensor, kind: str | None) -> Tensor:
    """ELU, or ELU of x and -x side by side (twice the channels)."""
    if kind is None:
        return x
    return F.elu(x) if kind == "elu" else F.elu(torch.cat([x, -x], dim=1))
