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


def backward(grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions) -> Gradients:
    """Gradients of x, weight, bias and, with a gate, of the convolution's result; see `library.backward`."""
    from fastvq.kernels import causal_conv as kernels

    nothing, of_result = grad.new_empty(0), grad.new_empty(0)
    of_x, of_weight, of_bias = nothing, nothing.clone(), nothing.clone()
    mask, form, activation, needs_input, needs_weight, *_ = options
    how = {"mask": mask, "form": form, "activation": activation, "precision": product_precision("convolution")}
    sums = None
    if pre_gate is not None:
        grad, sums = kernels.gate_backward(grad, pre_gate)
        of_result = grad
    if needs_input:
        of_x = kernels.backward_input(grad, x, weight, **how)
    if needs_weight:
        of_weight, of_bias = kernels.backward_weight(grad, x, kernel_size=weight.shape[-1], sums=sums, **how)
    return of_x, of_weight, of_bias, of_result
