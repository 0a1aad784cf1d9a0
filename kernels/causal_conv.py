"""Masked causal convolution on a GPU, with the activation before it and the gate and sums after it, and its gradients.

The arithmetic is in `causal_conv_product`, `causal_conv_weight` and `causal_surroundings`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.kernels.causal_conv_product import convolve
from fastvq.kernels.causal_conv_weight import backward_weight
from fastvq.kernels.causal_surroundings import ACTIVATION_KINDS, gate_backward, nhwc
from fastvq.kernels.taps import read_taps

__all__ = ["backward_input", "backward_weight", "forward", "gate_backward"]


@torch.no_grad()
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str,
    form: str,
    activation: str | None = None,
    context: Tensor | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
    keep_pre_gate: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """`fastvq.ops.causal_conv2d` of the activated x, with what surrounds it in a gated residual block.

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16; channels-last memory is taken as it is.
        weight: [O, C', k, k]; C' is 2 C for ``concat_elu``, else C.
        bias: [O] or None.
        mask, form: as for `fastvq.ops.causal_conv2d`.
        activation: None, ``elu``, or ``concat_elu`` (ELU of x and -x side by side), of x; padding stays 0.
        context: [B, O, H, W] or [B, O, 1, 1], added to the result.
        gate: multiplies the first half of the channels by the sigmoid of the second.
        residual: of the output's shape, added last.
        keep_pre_gate: also returns what the gate is applied to.
        precision: of products of float32: ``ieee`` or ``tf32``. Sums are float32 in any case.

    Returns:
        The output [B, O or O / 2, H, W] and, with a gate and ``keep_pre_gate``, [B, O, H, W], else None; both
        channels-last, of x's dtype.
    """
    batch, channels, height, width = x.shape
    columns = weight.shape[0]
    taps = read_taps(weight.shape[-1], mask, form)
    wanted = channels * 2 if activation == "concat_elu" else channels
    if weight.shape[1] != wanted:
        raise ArgumentError(f"weight: expected {wanted} input channels, got {weight.shape[1]}")
    if gate and columns % 2:
        raise ArgumentError(f"weight: expected an even number of output channels to gate, got {columns}")
    packed = _packed(weight, taps.count, x.dtype)
    out = _image(x, batch, columns // 2 if gate else columns, height, width)
    pre_gate = _image(x, batch, columns, height, width) if gate and keep_pre_gate else None
    sample_context = context is not None and context.shape[2:] != x.shape[2:]
    convolve(
        nhwc(x), packed, out, taps, kind=ACTIVATION_KINDS[activation], precision=precision, gate=gate,
        bias=None if bias is None else bias.contiguous(), context=None if context is None else nhwc(context),
        sample_context=sample_context, residual=None if residual is None else nhwc(residual), pre_gate=pre_gate,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2), None if pre_gate is None else pre_gate.permute(0, 3, 1, 2)


@torch.no_grad()
def backward_input(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    *,
    mask: str,
    form: str,
    activation: str | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Gradient [B, C, H, W] with respect to `forward`'s x, channels-last, from that of the convolution's result.

    Args:
        grad: [B, O, H, W], of the dtype of the products.
        x: [B, C, H, W], needed with an activation.
        weight, mask, form, activation, precision: as for `forward`.
    """
    taps = read_taps(weight.shape[-1], mask, form)
    kind = ACTIVATION_KINDS[activation]
    batch, _, height, width = grad.shape
    if kind and x is None:
        raise ArgumentError("x: expected the input, which the activation's derivative needs, got None")
    channels = weight.shape[1] // 2 if activation == "concat_elu" else weight.shape[1]
    out = _image(grad, batch, channels, height, width)
    given = nhwc(x) if kind and x is not None else None
    packed = _packed(weight, taps.count, grad.dtype, transposed=True)
    convolve(nhwc(grad), packed, out, taps, reverse=True, derivative=kind, given=given, precision=precision)
    return out.permute(0, 3, 1, 2)


def _packed(weight: Tensor, taps: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The taps of weight [O, C', k, k] that are read: [T, O, C'], or [T, C', O] transposed."""
    order = (2, 1, 0) if transposed else (2, 0, 1)
    return weight.flatten(2)[:, :, :taps].permute(order).to(dtype).contiguous()


def _image(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    return like.new_empty((batch, height, width, channels))
