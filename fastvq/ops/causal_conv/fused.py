"""Masked convolution by the library's convolutions on the taps that are read, between two Triton kernels.

The rows above and the current row are a convolution each, as in `fastvq.ops.causal_conv.library`. One kernel activates
x and lays it out so that neither needs a copy or a tap of zeros; another adds the two results, bias, context, gate and
residual. The backward pass is the same in reverse. Kernels are imported with the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.kernels.taps import Taps, read_taps
from fastvq.ops.causal_conv.library import channels_last, library_gradients
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options

if TYPE_CHECKING:
    from fastvq.kernels.causal_surroundings import Layout


class _Part(NamedTuple):
    """One of the two convolutions: which taps of the kernel, how x lies in its input, and the library's padding."""

    rows: slice
    columns: slice
    layout: Layout
    padding: tuple[int, int]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W]."""
    from fastvq.kernels import causal_surroundings as kernels

    x = kernels.nhwc(x)
    batch, height, width, _ = x.shape
    channels = weight.shape[0]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty((batch, height, width, channels // 2 if options.gate else channels), dtype=dtype)
    pre_gate = x.new_empty((batch, height, width, channels)) if options.gate and options.keep else None
    parts = _parts(read_taps(weight.shape[-1], options.mask, options.form), height, width) if x.numel() else ()
    whole, found = kernels.Layout(height, width), []
    if parts:
        images = kernels.spread(x, kernels.ACTIVATION_KINDS[options.activation], *(part.layout for part in parts))
        for part, image in zip(parts, images, strict=True):
            result = F.conv2d(image.permute(0, 3, 1, 2), _kernel(weight, part), padding=part.padding)
            found.append((kernels.nhwc(result), whole))
    around = kernels.Surroundings(
        bias=None if bias is None else bias.contiguous(),
        context=None if context is None else kernels.nhwc(context),
        residual=None if residual is None else kernels.nhwc(residual),
        gate=options.gate,
    )
    kernels.join(out, tuple(found), around, pre_gate)
    return out.permute(0, 3, 1, 2), None if pre_gate is None else pre_gate.permute(0, 3, 1, 2)


def backward(grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions) -> Gradients:
    """Gradients of x, weight, bias and, with a gate, of the convolution's result; see `library.backward`."""
    from fastvq.kernels import causal_surroundings as kernels

    nothing, of_result = grad.new_empty(0), grad.new_empty(0)
    of_x, of_weight, of_bias = nothing, nothing.clone(), nothing.clone()
    sums = None
    if pre_gate is not None:
        grad, sums = kernels.gate_backward(grad, pre_gate)
        of_result = grad
    x, grad = kernels.nhwc(x), channels_last(grad)
    batch, height, width, channels = x.shape
    kind = kernels.ACTIVATION_KINDS[options.activation]
    parts = _parts(read_taps(weight.shape[-1], options.mask, options.form), height, width) if x.numel() else ()
    if options.needs_weight:
        of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        sums = grad.sum((0, 2, 3), dtype=torch.float64) if sums is None else sums
        of_bias = sums.to(weight.dtype)
    found = []
    if parts and (options.needs_input or options.needs_weight):
        layouts = [part.layout for part in parts]
        if options.needs_weight:
            images = kernels.spread(x, kind, *layouts)
        else:
            # The library asks for the input even where only its shape matters.
            depth = channels * max(1, kind)
            images = tuple(x.new_empty((batch, layout.rows, layout.columns, depth)) for layout in layouts)
        for part, image in zip(parts, images, strict=True):
            given = image.permute(0, 3, 1, 2)
            of_image, of_part = library_gradients(
                grad, given, _kernel(weight, part), part.padding, options.needs_input, options.needs_weight
            )
            if of_image is not None:
                found.append((kernels.nhwc(of_image), part.layout))
            if of_part is not None:
                of_weight[:, :, part.rows, part.columns] = of_part
    if options.needs_input:
        of_x = torch.empty_like(x)
        given = x if kind else None
        kernels.join(of_x, tuple(found), kernels.Surroundings(given=given, derivative=kind))
        of_x = of_x.permute(0, 3, 1, 2)
    return of_x, of_weight, of_bias, of_result


def _parts(taps: Taps, height: int, width: int) -> tuple[_Part, ...]:
    """Those that read anything of a grid of that size; their results have the grid's size."""
    from fastvq.kernels.causal_surroundings import Layout

    kernel, above, left, _ = taps
    parts = []
    if above and height > 1:
        # Row 0 reads zeros alone, and the last row is not read. Columns outside are the library's own padding where
        # it is the same on both sides.
        odd = kernel % 2 == 1
        columns, right = (width, 0) if odd else (width + kernel - 1, left)
        layout = Layout(height - 1 + above, columns, above, right)
        parts.append(_Part(slice(0, above), slice(0, kernel), layout, (0, left if odd else 0)))
    if taps.current:
        # What lies behind the mask at the end of a row is left out.
        layout = Layout(height, width + taps.current - 1, 0, left)
        parts.append(_Part(slice(above, above + 1), slice(0, taps.current), layout, (0, 0)))
    return tuple(parts)


def _kernel(weight: Tensor, part: _Part) -> Tensor:
    """[O, C', rows, columns] in the memory that the library multiplies channels-last images with."""
    return weight[:, :, part.rows, part.columns].contiguous(memory_format=torch.channels_last)
