"""Masked convolution over a grid in raster order, alone and with what surrounds it in a gated residual block."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq._check import require_choice, require_dense, require_floating, require_like, require_shape, require_tensor
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError
from fastvq.ops._registered import learns
from fastvq.ops.causal_conv import backends, library
from fastvq.ops.causal_conv.block import Step, one_step
from fastvq.ops.causal_conv.options import Options
from fastvq.ops.causal_conv.reference import causal_conv2d_reference, fused_causal_conv2d_reference
from fastvq.ops.dispatch import is_differentiated, require_plain, runs_directly
from fastvq.ops.grid import FORMS, MASKS, PROLOGUES, Form, Mask, Prologue

__all__ = ["causal_conv2d", "causal_conv2d_reference", "fused_causal_conv2d", "fused_causal_conv2d_reference"]


def causal_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Mask = "strict",
    form: Form = "rows",
    backend: str | None = None,
) -> Tensor:
    """Convolution that reads only positions before the current one in raster order.

    Args:
        x: features [B, C, H, W], floating point. Channels-last memory is read as it is, other memory copied first.
        weight: kernel [O, C, k, k]. Entries behind the mask never reach the output and get zero gradient.
        bias: [O] or None.
        mask: ``strict`` leaves the current position out, ``inclusive`` reads it.
        form: ``rows`` reads k rows ending at the current one (van den Oord et al. 2016, PixelSNAIL ports);
            ``symmetric`` is the usual kernel centred on the current position, of which the lower half is masked.
            Columns reach k // 2 to the left and k - 1 - k // 2 to the right in both.
        backend: None for the best that can run, ``"triton"`` (GPU), ``"fused"`` (GPU: the library's convolution between
            two Triton kernels) or ``"torch"``; see `fastvq.ops.explain_backend` and docs/numerics.md.

    Returns:
        [B, O, H, W] in channels-last memory, of x's dtype (that of autocast where it is on).

    Only valid taps are multiplied, so that neither a NaN in a masked weight nor one in a later position can leak. The
    gradient has no gradient: differentiating twice raises, except through `causal_conv2d_reference`, which is also what
    derivatives of torch.func and forward mode take.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes or devices that do not fit.
        UnavailableError: the backend asked for cannot run here.
    """
    return fused_causal_conv2d(x, weight, bias, mask=mask, form=form, backend=backend)


@annotate("causal_conv2d")
def fused_causal_conv2d(
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
    backend: str | None = None,
) -> Tensor:
    """residual + gate(causal_conv2d(activation(x)) + context), without storing what lies between.

    Both halves of a gated residual block (Chen et al. 2017, figure 3) are of this kind. The activation of x is not kept
    for the backward pass.

    Args:
        x, weight, bias, mask, form, backend: as for `causal_conv2d`.
        activation: ``elu``, or ``concat_elu``: ELU of x and -x side by side, for which weight has 2 C input channels;
            or None.
        context: [B, O, H, W], or [B, O, 1, 1] for all positions, or None.
        gate: the first half of the O channels times the sigmoid of the second (GLU).
        residual: of the result's shape, or None.

    Returns:
        [B, O, H, W] or, with a gate, [B, O / 2, H, W], in channels-last memory. Of x's dtype, or that of the residual
        if it is wider.

    Raises:
        ArgumentError, ArgumentTypeError, UnavailableError: as `causal_conv2d`.
    """
    options = Options(mask, form, activation, gate, False, backend)
    _check(x, weight, bias, context, residual, options)
    direct = runs_directly(x, weight, optional=(bias, context, residual))
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # The residual keeps its type: sums of many layers stay as precise as they are without fusion.
        if direct and backends.reads_any_type(x, weight, options):
            options = options._replace(backend="fused", dtype=dtype)
        else:
            x, weight = _cast(x, dtype), _cast(weight, dtype)
            bias = None if bias is None else _cast(bias, dtype)
        context = None if context is None else _cast(context, dtype)
    if not direct and is_differentiated():
        require_plain("causal_conv2d", backend)
        return fused_causal_conv2d_reference(
            x,
            weight,
            bias,
            mask=mask,
            form=form,
            activation=activation,
            context=context,
            gate=gate,
            residual=residual,
        )
    if not direct and backends.is_left_to_compiler(x, backend):
        return library.forward(x, weight, bias, context, residual, options)[0]
    learning = learns(x, weight, bias, context, residual)
    if gate and learning:
        options = options._replace(keep=True)
    out: Tensor = backends.causal_conv2d(
        x, weight, bias, context, residual, options=options, direct=direct, learns=learning
    )[0]
    return out


def gated_block(x: Tensor, first: Step, second: Step) -> Tensor:
    """x + gate(second(first(x))): two steps of `fused_causal_conv2d`, of which the second is gated.

    Raises:
        ArgumentError, ArgumentTypeError, UnavailableError: as `causal_conv2d`.
    """
    given, extras = (x, first.weight, second.weight), (first.bias, first.context, second.bias, second.context)
    if learns(*given, *extras) and runs_directly(*given, optional=extras) and backends.runs_blocks(*given):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        _check(x, first.weight, first.bias, first.context, None, first.options(dtype))
        if dtype is not None:
            first, second = (
                step if step.context is None else step._replace(context=_cast(step.context, dtype))
                for step in (first, second)
            )
        return one_step(x, first, second, dtype, _check)
    return _step(_step(x, first, None), second, x)


def _step(x: Tensor, step: Step, residual: Tensor | None) -> Tensor:
    return fused_causal_conv2d(
        x,
        step.weight,
        step.bias,
        mask=step.mask,
        form=step.form,
        activation=step.activation,
        context=step.context,
        gate=step.gate,
        residual=residual,
    )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> None:
    require_choice("mask", options.mask, MASKS)
    require_choice("form", options.form, FORMS)
    if options.activation is not None:
        require_choice("activation", options.activation, PROLOGUES)
    require_floating("x", require_tensor("x", x))
    if x.ndim != 4:
        require_shape("x", x, ["B", "C", "H", "W"])
    batch, channels, height, width = x.shape
    inputs = channels * (2 if options.activation == "concat_elu" else 1)
    require_dense("weight", require_tensor("weight", weight))
    if weight.ndim != 4 or weight.shape[1] != inputs:
        require_floating("weight", weight)
        require_shape("weight", weight, ["O", inputs, "k", weight.shape[-1] if weight.ndim else 0])
    require_like("weight", weight, weight.shape, x, "x")
    outputs, _, kernel, columns = weight.shape
    if kernel != columns:
        raise ArgumentError(f"weight: expected a square kernel, got {list(weight.shape)}")
    if kernel == 0:
        raise ArgumentError(f"weight: expected a kernel of at least 1 x 1, got {list(weight.shape)}")
    if options.gate and outputs % 2:
        raise ArgumentError(f"weight: expected an even number of output channels to gate, got {outputs}")
    if bias is not None:
        require_like("bias", bias, (outputs,), x, "x")
    if context is not None:
        require_dense("context", require_tensor("context", context))
        uniform = context.shape[2:] == (1, 1)
        require_like("context", context, (batch, outputs, *((1, 1) if uniform else (height, width))), x, "x")
    if residual is not None:
        shape = (batch, outputs // 2 if options.gate else outputs, height, width)
        require_like("residual", residual, shape, x, "x", any_dtype=True)
