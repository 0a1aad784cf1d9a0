"""Masked convolution by the project's Triton kernels, which are imported with the first call."""

from __future__ import annotations

from torch import Tensor

from fastvq._precision import product_precision
from fastvq.ops.causal_conv.library import channels_last
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W]."""
    from fastvq.kernels import causal_conv as kernels

    # The kernel writes x's type; under autocast the residual may be wider.
    fits = residual is None or residual.dtype == x.dtype
    out, pre_gate = kernels.forward(
        x,
        weight,
        bias,
        mask=options.mask,
        form=options.form,
        activation=options.activation,
        context=context,
        gate=options.gate,
        residual=residual if fits else None,
        keep_pre_gate=options.keep,
        precision=product_precision("convolution"),
    )
    if residual is not None and not fits:
        out = out + residual
    return channels_last(out), pre_gate


def backward(grad: Tensor, x: Tensor, weight: Tensor, options: GradientOptions) -> Gradients:
    """Gradients of x, weight and bias from that of the convolution's result; an empty tensor for what is not needed."""
    from fastvq.kernels import causal_conv as kernels
    from fastvq.kernels import causal_conv_weight as weight_kernels

    nothing = grad.new_empty(0)
    of_x, of_weight, of_bias = nothing, nothing, nothing.clone()
    mask, form, activation, needs_input, needs_weight, _ = options
    how = {"mask": mask, "form": form, "activation": activation, "precision": product_precision("convolution")}
    if needs_input:
        of_x = kernels.backward_input(grad, x, weight, **how)
    if needs_weight:
        of_weight, of_bias = weight_kernels.backward_weight(grad, x, kernel_size=weight.shape[-1], **how)
    return of_x, of_weight, of_bias


def gate_backward(grad: Tensor, pre_gate: Tensor) -> Tensor:
    """Gradient [B, O, H, W] of what is gated, from that of the gate's result."""
    from fastvq.kernels import causal_conv as kernels

    return kernels.gate_backward(grad, pre_gate)
