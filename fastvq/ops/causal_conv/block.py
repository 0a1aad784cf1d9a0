"""A gated residual block in one step of autograd, where the library's convolutions run between Triton kernels.

Against two steps this spares taking taps out of the weights twice, a pass that adds two gradients of x, and one that
sums the inner gradient for a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvq.ops.causal_conv import backends, fused
from fastvq.ops.causal_conv.options import GradientOptions, Options
from fastvq.ops.grid import Form, Mask, Prologue


class Step(NamedTuple):
    """One convolution of a block, as `fastvq.ops.fused_causal_conv2d` takes it."""

    weight: Tensor
    bias: Tensor | None
    context: Tensor | None
    mask: Mask
    form: Form
    activation: Prologue | None
    gate: bool

    def options(self, dtype: torch.dtype | None) -> Options:
        """For ``fused``, with whatever the gate is applied to."""
        return Options(self.mask, self.form, self.activation, self.gate, self.gate, "fused", dtype)


def one_step(x: Tensor, first: Step, second: Step, dtype: torch.dtype | None, check: Callable[..., None]) -> Tensor:
    """x + gate(second(first(x))) by ``fused``, multiplied in ``dtype``; ``check`` is of the second's arguments."""
    steps = *first[:3], *second[:3], first.options(dtype), second.options(dtype)
    out: Tensor = _Block.apply(x, *steps, check)
    return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        inner_bias: Tensor | None,
        inner_context: Tensor | None,
        outer: Tensor,
        outer_bias: Tensor | None,
        outer_context: Tensor | None,
        of_first: Options,
        of_second: Options,
        check: Callable[..., None],
    ) -> Tensor:
        inner_kernels = fused.pack(x, inner, of_first)
        h, _ = fused.forward(x, inner, inner_bias, inner_context, None, of_first, inner_kernels)
        check(h, outer, outer_bias, outer_context, x, of_second)
        outer_kernels = fused.pack(h, outer, of_second)
        out, pre_gate = fused.forward(h, outer, outer_bias, outer_context, x, of_second, outer_kernels)
        ctx.save_for_backward(x, inner, h, outer, pre_gate, *inner_kernels, *outer_kernels)
        ctx.parts = len(inner_kernels)
        ctx.options = of_first, of_second
        ctx.uniform = tuple(one is not None and one.shape[2:] != x.shape[2:] for one in (inner_context, outer_context))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner, h, outer, pre_gate, *kernels = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_first, of_second = ctx.options
        learns = needs[1] or needs[2]
        below = needs[0] or learns or needs[3]
        wanted = of_second.gradients(below, needs[4] or needs[5])
        known = fused.Known(tuple(kernels[ctx.parts :]), sums_input=learns)
        (of_h, of_outer, of_outer_bias, of_result), sums = _differentiate(grads[0], h, outer, pre_gate, wanted, known)
        of_x = of_inner = of_inner_bias = None
        if below:
            wanted = of_first.gradients(needs[0], learns)
            known = fused.Known(tuple(kernels[: ctx.parts]), sums, grads[0])
            (of_x, of_inner, of_inner_bias, _), _ = _differentiate(of_h, x, inner, None, wanted, known)
        of_contexts = [
            None if not needed else one.sum((2, 3), keepdim=True) if uniform else one
            for needed, one, uniform in zip((needs[3], needs[6]), (of_h, of_result), ctx.uniform, strict=True)
        ]
        return (
            of_x, of_inner, of_inner_bias, of_contexts[0], of_outer, of_outer_bias, of_contexts[1], None, None, None
        )  # fmt: skip


def _differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions, known: fused.Known
) -> Any:
    """As `fused.differentiate`; where gradients of gradients might be asked for, by the operation that refuses them."""
    if not torch.is_grad_enabled():
        return fused.differentiate(grad, x, weight, pre_gate, options, known)
    given = grad, x, weight, pre_gate
    of_x, *rest = backends.causal_conv2d_backward(*given, options=options, direct=False)
    if options.needs_input and known.residual is not None:
        of_x = of_x + known.residual
    return (of_x, *rest), None
