"""Masked convolution over a grid in raster order, alone and with what surrounds it in a gated residual block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvq._check import FLOATING_DTYPES, require_choice, require_floating, require_shape, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError, UnavailableError
from fastvq.ops import causal_conv_backends as backends
from fastvq.ops.causal_grid import FORMS, MASKS, PROLOGUES, Form, Mask, Prologue, read_taps
from fastvq.ops.causal_reference import fused_causal_conv2d_reference
from fastvq.ops.dispatch import is_differentiated, require_plain, runs_directly


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
        backend: None for the first that can run, ``"triton"`` (GPU) or ``"torch"``; see `fastvq.ops.explain_backend`.

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

    Both halves of a gated residual block (Chen et al. 2017, figure 3) are of this kind. The activation of x is neither
    kept for the backward pass nor, on a GPU, ever written.

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
        As `causal_conv2d`.
    """
    direct = runs_directly(x, weight, optional=(bias, context, residual))
    if not (direct and _fits(x, weight, bias, context, residual, mask, form, activation, gate)):
        tensors = {"x": x, "weight": weight, "bias": bias, "context": context, "residual": residual}
        _check(tensors, mask, form, activation, gate)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # The residual keeps its type: sums of many layers stay as precise as they are without fusion.
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
        context = None if context is None else _cast(context, dtype)
    learns = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (context is not None and context.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    arguments = (x, weight, bias, context, residual, mask, form, activation, gate, gate and learns, backend)
    if not direct:
        if is_differentiated():
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
        return torch.ops.fastvq.causal_conv2d(*arguments)[0]
    return _Direct.apply(*arguments) if learns else backends.run(*arguments)[0]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    residual: Tensor | None,
    mask: str,
    form: str,
    activation: str | None,
    gate: bool,
) -> bool:
    """Whether tensors are beyond doubt what `_check` expects, which takes ten times as long to say so."""
    shape, of_weight, dtype, device = x.shape, weight.shape, x.dtype, x.device
    if len(shape) != 4 or len(of_weight) != 4:
        return False
    batch, channels, height, width = shape
    outputs, inputs, kernel, columns = of_weight
    return (
        mask in MASKS
        and form in FORMS
        and (activation is None or activation in PROLOGUES)
        and inputs == (channels * 2 if activation == "concat_elu" else channels)
        and 0 < kernel == columns
        and not (gate and outputs % 2)
        and dtype in FLOATING_DTYPES
        and weight.dtype == dtype
        and weight.device == device
        and (bias is None or (bias.shape == (outputs,) and bias.dtype == dtype and bias.device == device))
        and (
            context is None
            or (
                context.shape in ((batch, outputs, 1, 1), (batch, outputs, height, width))
                and context.dtype == dtype
                and context.device == device
            )
        )
        and (
            residual is None
            or (
                residual.shape == (batch, outputs // 2 if gate else outputs, height, width)
                and residual.dtype == dtype
                and residual.device == device
            )
        )
    )


def _check(tensors: dict[str, Tensor | None], mask: str, form: str, activation: str | None, gate: bool) -> None:
    require_choice("mask", mask, MASKS)
    require_choice("form", form, FORMS)
    if activation is not None:
        require_choice("activation", activation, PROLOGUES)
    given = {name: require_tensor(name, tensor) for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        require_floating(name, tensor)
    x, weight = given["x"], given["weight"]
    require_shape("x", x, ["B", "C", "H", "W"])
    batch, channels, height, width = x.shape
    inputs = channels * (2 if activation == "concat_elu" else 1)
    require_shape("weight", weight, ["O", inputs, "k", weight.shape[-1] if weight.ndim else 0])
    outputs, kernel = weight.shape[0], weight.shape[2]
    if kernel != weight.shape[3]:
        raise ArgumentError(f"weight: expected a square kernel, got {list(weight.shape)}")
    if kernel == 0:
        raise ArgumentError(f"weight: expected a kernel of at least 1 x 1, got {list(weight.shape)}")
    if gate and outputs % 2:
        raise ArgumentError(f"weight: expected an even number of output channels to gate, got {outputs}")
    if "bias" in given:
        require_shape("bias", given["bias"], [outputs])
    if "context" in given:
        uniform = given["context"].shape[2:] == (1, 1)
        require_shape("context", given["context"], [batch, outputs, *((1, 1) if uniform else (height, width))])
    if "residual" in given:
        require_shape("residual", given["residual"], [batch, outputs // 2 if gate else outputs, height, width])
    cast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise ArgumentError(f"{name}: expected device {x.device} as for x, got {tensor.device}")
        if tensor.dtype != x.dtype and not (cast or name == "residual"):
            raise ArgumentTypeError(f"{name}: expected {x.dtype} as for x, got {tensor.dtype}")


# Registered by hand: torch.library.custom_op costs ten times as much per call.
_library = torch.library.Library("fastvq", "FRAGMENT")
_library.define(
    "causal_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? context, Tensor? residual, str mask, str form,"
    " str? activation, bool gate, bool keep, str? backend) -> (Tensor out, Tensor pre_gate)"
)
_library.define(
    "causal_conv2d_backward(Tensor grad, Tensor x, Tensor weight, str mask, str form, str? activation,"
    " bool needs_input, bool needs_weight, str? backend) -> (Tensor of_x, Tensor of_weight, Tensor of_bias)"
)
_library.define("causal_conv2d_gate_backward(Tensor grad, Tensor pre_gate, str? backend) -> Tensor")
for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("causal_conv2d", backends.forward, _device)
    _library.impl("causal_conv2d_backward", backends.backward, _device)
    _library.impl("causal_conv2d_gate_backward", backends.gate_backward, _device)


def _image(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the same batch and grid, channels-last."""
    batch, _, height, width = like.shape
    return like.new_empty((batch, height, width, channels), dtype=dtype or like.dtype).permute(0, 3, 1, 2)


@torch.library.register_fake("fastvq::causal_conv2d", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    residual: Tensor | None,
    mask: str,
    form: str,
    activation: str | None,
    gate: bool,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = _image(x, channels // 2 if gate else channels, dtype)
    return out, _image(x, channels) if gate and keep else x.new_empty(0)


@torch.library.register_fake("fastvq::causal_conv2d_backward", lib=_library)
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: str,
    form: str,
    activation: str | None,
    needs_input: bool,
    needs_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _image(x, x.shape[1]) if needs_input else x.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_weight else (0,)),
    )


@torch.library.register_fake("fastvq::causal_conv2d_gate_backward", lib=_library)
def _(grad: Tensor, pre_gate: Tensor, backend: str | None) -> Tensor:
    return _image(pre_gate, pre_gate.shape[1])


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, inputs, output[1])


def _keep(ctx: Any, inputs: tuple, pre_gate: Tensor | None) -> None:
    x, weight, _bias, context, residual, mask, form, activation, gate, keep, backend = inputs
    ctx.save_for_backward(x, weight, pre_gate)
    ctx.options = mask, form, activation, gate, keep, backend
    # Context for all positions gets the sum of what each of them got.
    ctx.uniform_context = context is not None and context.shape[2:] != x.shape[2:]
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    x, weight, pre_gate = ctx.saved_tensors
    mask, form, activation, gate, keep, backend = ctx.options
    needs_x, needs_weight, needs_bias, needs_context, needs_residual, *_ = ctx.needs_input_grad
    of_residual = grad.to(ctx.residual_dtype) if needs_residual else None
    of_x = of_weight = of_bias = of_context = None
    if needs_x or needs_weight or needs_bias or needs_context:
        grad = grad.to(x.dtype)
        if gate:
            if not keep:
                raise UnavailableError("keep: the gradient of a gate needs what the forward pass was told not to keep")
            direct = _has_no_gradient(grad, pre_gate)
            of_gate = backends.gate_backward if direct else torch.ops.fastvq.causal_conv2d_gate_backward
            grad = of_gate(grad, pre_gate, backend)
        if needs_context:
            of_context = grad.sum((2, 3), keepdim=True) if ctx.uniform_context else grad
        if needs_x or needs_weight or needs_bias:
            direct = _has_no_gradient(grad, x, weight)
            backward = backends.backward if direct else torch.ops.fastvq.causal_conv2d_backward
            of_x, of_weight, of_bias = backward(
                grad, x, weight, mask, form, activation, needs_x, needs_weight or needs_bias, backend
            )
    return (
        of_x if needs_x else None,
        of_weight if needs_weight else None,
        of_bias if needs_bias else None,
        of_context,
        of_residual,
        *(None,) * 6,
    )


def _has_no_gradient(*tensors: Tensor) -> bool:
    """Whether a backend may find a gradient directly: nobody will ask for the gradient of that."""
    return not torch.is_grad_enabled() and runs_directly(*tensors)


class _Direct(torch.autograd.Function):
    """The operation as it is registered below, for callers that have no need of the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, pre_gate = backends.run(*inputs)
        _keep(ctx, inputs, pre_gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward(ctx, grad, None)


@register_flop_formula(torch.ops.fastvq.causal_conv2d)
def _flops(
    x: torch.Size, weight: torch.Size, bias: Any, context: Any, residual: Any, mask: str, form: str, *_: Any, **__: Any
) -> int:
    """Of the taps that are read, for torch.utils.flop_counter."""
    taps = read_taps(weight[-1], mask, form)
    return 2 * x[0] * x[2] * x[3] * weight[0] * weight[1] * (taps.above * weight[-1] + taps.current)


@register_flop_formula(torch.ops.fastvq.causal_conv2d_backward)
def _backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    mask: str,
    form: str,
    activation: str | None,
    needs_input: bool,
    needs_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (needs_input + needs_weight) * _flops(x, weight, None, None, None, mask, form)


def _no_second_gradient(ctx: Any, *grads: Tensor | None) -> Any:
    raise UnavailableError(
        "causal_conv2d: the gradient cannot be differentiated again; use causal_conv2d_reference or"
        " fused_causal_conv2d_reference, plain PyTorch"
    )


torch.library.register_autograd("fastvq::causal_conv2d", _backward, setup_context=_keep_for_backward, lib=_library)
for _name in ("causal_conv2d_backward", "causal_conv2d_gate_backward"):
    torch.library.register_autograd(f"fastvq::{_name}", _no_second_gradient, lib=_library)
