"""The backends of masked convolution, and the operations registered for it.

What a row runs is a module with ``forward`` and ``backward``, see `fastvq.ops.causal_conv.library`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.taps import read_taps
from fastvq.ops._registered import ALL_DEVICES, Gradient, Registered
from fastvq.ops.causal_conv import fused, library, triton
from fastvq.ops.causal_conv.choice import preferred
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options
from fastvq.ops.dispatch import Backend, Backends, anywhere, runs_directly, triton_reason

BACKENDS = Backends(
    "causal_conv2d",
    [
        Backend("torch", anywhere, library),
        Backend("fused", triton_reason, fused, gpu=True),
        Backend("triton", triton_reason, triton, gpu=True),
    ],
    prefer=preferred,
)


def reads_any_type(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether ``fused`` runs, which reads tensors of any type but float64 as it multiplies them."""
    if not x.is_cuda or torch.float64 in (x.dtype, weight.dtype) or options.backend not in (None, "fused"):
        return False
    chosen = BACKENDS.select(options.backend, x, weight, mask=options.mask, form=options.form)
    return chosen.name == "fused"


def runs_blocks(*tensors: Tensor) -> bool:
    """Whether gated blocks that learn are one step of ``fused``, whatever the sizes: it takes the fewest launches."""
    return tensors[0].is_cuda and triton_reason(*tensors) is None


def is_left_to_compiler(x: Tensor, backend: str | None) -> bool:
    """Whether a compiler is to see PyTorch's operators in place of the registered one.

    On a GPU it makes one kernel of what surrounds the library's convolutions, and launches all of them at less cost
    than the registered operation does.
    """
    return x.is_cuda and backend is None and torch.compiler.is_compiling()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    chosen = BACKENDS.select(options.backend, x, weight, mask=options.mask, form=options.form)
    found: tuple[Tensor, Tensor | None] = chosen.run.forward(x, weight, bias, context, residual, options)
    return found


def _backward(grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions) -> Gradients:
    chosen = BACKENDS.select(options.backend, x, weight, mask=options.mask, form=options.form)
    found: Gradients = chosen.run.backward(grad, x, weight, pre_gate, options)
    return found


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    dtype = options.dtype or x.dtype
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = library.empty_image(x, channels // 2 if options.gate else channels, wide)
    return out, library.empty_image(x, channels, dtype) if options.gate and options.keep else x.new_empty(0)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions
) -> Gradients:
    return (
        library.empty_image(x, x.shape[1]) if options.needs_input else x.new_empty(0),
        weight.new_empty(weight.shape if options.needs_weight else (0,)),
        weight.new_empty(weight.shape[:1] if options.needs_weight else (0,)),
        x.new_empty(0) if pre_gate is None else library.empty_image(x, weight.shape[0], options.dtype),
    )


def _keep(ctx: Any, tensors: tuple[Any, ...], options: Options, outputs: tuple[Any, ...]) -> None:
    x, weight, _bias, context, residual = tensors
    ctx.save_for_backward(x, weight, outputs[1])
    ctx.options = options
    # Context for all positions gets the sum of what each of them got.
    ctx.uniform_context = context is not None and context.shape[2:] != x.shape[2:]
    ctx.residual_dtype = None if residual is None else residual.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, pre_gate = ctx.saved_tensors
    options: Options = ctx.options
    needs_x, needs_weight, needs_bias, needs_context, needs_residual, *_ = ctx.needs_input_grad
    of_residual = grad.to(ctx.residual_dtype) if needs_residual else None
    of_x = of_weight = of_bias = of_context = None
    if needs_x or needs_weight or needs_bias or needs_context:
        if options.dtype is None:
            grad = grad.to(x.dtype)
        if options.gate and not options.keep:
            raise UnavailableError("keep: the gradient of a gate needs what the forward pass was told not to keep")
        gated = pre_gate if options.gate else None
        if options.gate or needs_x or needs_weight or needs_bias:
            wanted = options.gradients(needs_x, needs_weight or needs_bias)
            # Nobody will ask for the gradient of this gradient where none is recorded.
            direct = not torch.is_grad_enabled() and runs_directly(grad, x, weight)
            of_x, of_weight, of_bias, of_result = causal_conv2d_backward(
                grad, x, weight, gated, options=wanted, direct=direct
            )
            grad = of_result if options.gate else grad
        if needs_context:
            of_context = grad.sum((2, 3), keepdim=True) if ctx.uniform_context else grad
    return (
        of_x if needs_x else None,
        of_weight if needs_weight else None,
        of_bias if needs_bias else None,
        of_context,
        of_residual,
    )


def _flops(x: torch.Size, weight: torch.Size, *rest: Any) -> int:
    """Of the taps that are read."""
    options = rest[-1]
    taps = read_taps(weight[-1], options.mask, options.form)
    return 2 * x[0] * x[2] * x[3] * weight[0] * weight[1] * taps.count


def _backward_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, pre_gate: Any, options: GradientOptions
) -> int:
    return (options.needs_input + options.needs_weight) * _flops(x, weight, options)


_NO_SECOND = (
    "causal_conv2d: the gradient cannot be differentiated again; use causal_conv2d_reference or"
    " fused_causal_conv2d_reference, plain PyTorch"
)
causal_conv2d = Registered(
    "causal_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? context, Tensor? residual, str mask, str form,"
    " str? activation, bool gate, bool keep, str? backend, ScalarType? dtype=None) -> (Tensor out, Tensor pre_gate)",
    Options,
    _forward,
    _fake,
    devices=ALL_DEVICES,
    gradient=Gradient(_keep, _gradient),
    flops=_flops,
)
causal_conv2d_backward = Registered(
    "causal_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? pre_gate, str mask, str form,"
    " str? activation, bool needs_input, bool needs_weight, str? backend, ScalarType? dtype=None)"
    " -> (Tensor of_x, Tensor of_weight, Tensor of_bias, Tensor of_result)",
    GradientOptions,
    _backward,
    _fake_backward,
    devices=ALL_DEVICES,
    gradient=_NO_SECOND,
    flops=_backward_flops,
)
