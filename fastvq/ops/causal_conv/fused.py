"""Masked convolution by the library's convolutions on the taps that are read, between Triton kernels.

The rows above and the current row are a convolution each, as in `fastvq.ops.causal_conv.library`. One kernel takes
their taps out of the weights; one activates x and lays it out so that neither needs a copy or a tap of zeros; another
adds the two results, bias, context, gate and residual. The backward pass is the same in reverse. Kernels are imported
with the first call.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.kernels.taps import CHANNEL_MULTIPLE, read_taps
from fastvq.ops.causal_conv.library import channels_last, library_gradients
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options

if TYPE_CHECKING:
    from fastvq.kernels.causal_surroundings import Layout


class _Part(NamedTuple):
    """One of the two convolutions: its segment of taps, its kernel, how x lies in its input, the library's padding."""

    segment: int
    rows: int
    columns: int
    layout: Layout
    padding: tuple[int, int]


class _Plan(NamedTuple):
    """The parts that read anything of the grid, and to how many outputs and channels they are filled up.

    Taps are packed in segments, those of the rows above and those of the current row, of so many each.
    """

    parts: tuple[_Part, ...]
    layouts: tuple[Layout, ...]
    segments: tuple[int, ...]
    outputs: int
    depth: int


class _Operands(NamedTuple):
    """Of a convolution: [B, C, rows, columns] and [O, C, rows, columns], channels-last; or, where one tap makes it a
    matrix product, [positions, C] and [O, C].
    """

    image: Tensor
    kernel: Tensor


class Known(NamedTuple):
    """What a block of several convolutions knows or wants beyond what one of them does.

    Attributes:
        packed: what `pack` made of the weight.
        sums: of the gradient of the result over some of its positions each, float32 [splits, O].
        residual: to be added to the gradient of x.
        sums_input: whether the gradient of x is to be summed too.
    """

    packed: Tensor | None = None
    sums: Tensor | None = None
    residual: Tensor | None = None
    sums_input: bool = False


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    residual: Tensor | None,
    options: Options,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W].

    ``packed`` is what `pack` made of the weight, if it has been called.
    """
    kernels, _ = _kernels()
    x = channels_last(x)
    batch, _, height, width = x.shape
    channels, dtype = weight.shape[0], options.dtype or x.dtype
    plan = _plan(height, width, weight.shape, options.mask, options.form)
    whole, found = kernels.Layout(height, width), []
    plain = not options.gate and context is None and residual is None
    alone = plain and len(plan.parts) == 1 and plan.outputs == channels
    for part, (image, kernel) in zip(plan.parts, _operands(x, weight, options, plan, packed), strict=False):
        if image.ndim == 4:
            found.append((channels_last(F.conv2d(image, kernel, padding=part.padding)), whole))
        elif alone:
            out = torch.mm(image, kernel.t()) if bias is None else torch.addmm(bias.to(dtype), image, kernel.t())
            return _image(out, 0, (batch, channels, height, width)), None
        else:
            found.append((torch.mm(image, kernel.t()), whole))
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = _empty(x, channels // 2 if options.gate else channels, wide)
    pre_gate = _empty(x, channels, dtype) if options.gate and options.keep else None
    around = kernels.Surroundings(
        bias=None if bias is None else bias.contiguous(),
        context=None if context is None else channels_last(context),
        residual=None if residual is None else channels_last(residual),
        gate=options.gate,
    )
    kernels.join(out, found, plan.outputs, around, pre_gate)
    return out, pre_gate


def pack(x: Tensor, weight: Tensor, options: Options | GradientOptions) -> Tensor | None:
    """The parts' kernels, one after the other: [O * taps, C]; None where nothing is multiplied."""
    plan = _plan(*x.shape[2:], weight.shape, options.mask, options.form)
    if not plan.parts or x.numel() == 0:
        return None
    packed: Tensor = _kernels()[1].pack(weight, plan.segments, plan.outputs, plan.depth, options.dtype or x.dtype)
    return packed


def backward(grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions) -> Gradients:
    """Gradients of x, weight, bias and, with a gate, of the convolution's result; see `library.backward`."""
    of_x, of_weight, of_bias, of_result = differentiate(grad, x, weight, pre_gate, options, Known())[0]
    return of_x, of_weight, of_bias, None if of_result is None else channels_last(of_result)


def differentiate(
    grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions, known: Known
) -> tuple[Gradients, Tensor | None]:
    """As `backward`, and sums of the gradient of x over some of its positions each, [splits, C], if asked for.

    The gradient of the result may have gaps in memory.
    """
    kernels, taps = _kernels()
    x = channels_last(x)
    batch, _, height, width = x.shape
    outputs, dtype = weight.shape[0], options.dtype or x.dtype
    plan = _plan(height, width, weight.shape, options.mask, options.form)
    before = None if pre_gate is None else channels_last(pre_gate)
    summed = options.needs_weight and known.sums is None
    result, sums = kernels.begin_backward(channels_last(grad), before, plan.outputs, dtype, summed=summed)
    image = _image(result, 0, (batch, plan.outputs, height, width))
    of_x = of_weight = of_bias = of_result = None
    if pre_gate is not None:
        of_result = image if plan.outputs == outputs else image[:, :outputs]
    of_images: list[tuple[Tensor, Layout]] = []
    of_kernels: list[Tensor | None] = [None for _ in plan.segments]
    if options.needs_input or options.needs_weight:
        given = _operands(x, weight, options, plan, known.packed, images=options.needs_weight)
        for part, operands in zip(plan.parts, given, strict=False):
            of_image, of_kernel = _gradients(result, image, operands, part.padding, options)
            of_kernels[part.segment] = of_kernel
            if of_image is not None:
                of_images.append((of_image, part.layout))
    if options.needs_weight:
        sums = sums if known.sums is None else known.sums
        of_weight, of_bias = taps.unpack(of_kernels, plan.segments, plan.depth, sums, weight)
    of_input = None
    if options.needs_input:
        of_x, kind = _empty(x, x.shape[1], x.dtype), kernels.ACTIVATION_KINDS[options.activation]
        residual = None if known.residual is None else channels_last(known.residual)
        around = kernels.Surroundings(residual=residual, given=x if kind else None, derivative=kind)
        of_input = kernels.join(of_x, of_images, plan.depth, around, summed=known.sums_input)
    return (of_x, of_weight, of_bias, of_result), of_input


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The modules `causal_surroundings` and `causal_conv_taps`."""
    from fastvq.kernels import causal_conv_taps, causal_surroundings

    return causal_surroundings, causal_conv_taps


@functools.lru_cache(maxsize=256)
def _plan(height: int, width: int, weight: torch.Size, mask: str, form: str) -> _Plan:
    """For weight [outputs, depth, size, size] over a grid of that size, which is that of the parts' results."""
    from fastvq.kernels.causal_surroundings import Layout

    outputs, depth, size, _ = weight
    taps = read_taps(size, mask, form)
    kernel, above, left, _ = taps
    segments = tuple(count for count in (above * kernel, taps.current) if count)
    parts = []
    if above and height > 1:
        # Row 0 reads zeros alone, and the last row is not read. Columns outside are the library's own padding where
        # it is the same on both sides.
        odd = kernel % 2 == 1
        columns, right = (width, 0) if odd else (width + kernel - 1, left)
        layout = Layout(height - 1 + above, columns, above, right)
        parts.append(_Part(0, above, kernel, layout, (0, left if odd else 0)))
    if taps.current:
        # What lies behind the mask at the end of a row is left out.
        layout = Layout(height, width + taps.current - 1, 0, left)
        parts.append(_Part(len(segments) - 1, 1, taps.current, layout, (0, 0)))
    filled = (size + -size % CHANNEL_MULTIPLE for size in (outputs, depth))
    return _Plan(tuple(parts), tuple(part.layout for part in parts), segments, *filled)


def _operands(
    x: Tensor,
    weight: Tensor,
    options: Options | GradientOptions,
    plan: _Plan,
    packed: Tensor | None,
    images: bool = True,
) -> list[_Operands]:
    """What the parts multiply, or nothing where there is nothing to multiply.

    ``images``: whether they are needed; the library asks for them even where only their shape matters.
    """
    kernels, _ = _kernels()
    packed = pack(x, weight, options) if packed is None else packed
    if packed is None:
        return []
    batch, depth, dtype = x.shape[0], plan.depth, packed.dtype
    if images:
        spread = kernels.spread(x, kernels.ACTIVATION_KINDS[options.activation], plan.layouts, depth, dtype)
    else:
        positions = batch * sum(layout.rows * layout.columns for layout in plan.layouts)
        spread = x.new_empty((positions, depth), dtype=dtype)
    found, first = [], 0
    for _segment, rows, columns, layout, _padding in plan.parts:
        last = first + batch * layout.rows * layout.columns
        tap = sum(plan.segments[:_segment])
        # How precise convolutions of float32 are is not how precise matrix products are.
        if rows * columns == 1 and dtype != torch.float32:
            if len(plan.parts) == 1 and len(plan.segments) == 1:
                found.append(_Operands(spread, packed))
            else:
                kernel = packed[plan.outputs * tap : plan.outputs * (tap + 1)]
                found.append(_Operands(spread[first:last], kernel))
        else:
            image = _image(spread, first, (batch, depth, layout.rows, layout.columns))
            found.append(_Operands(image, _image(packed, plan.outputs * tap, (plan.outputs, depth, rows, columns))))
        first = last
    return found


def _gradients(
    result: Tensor, image: Tensor, operands: _Operands, padding: tuple[int, int], options: GradientOptions
) -> tuple[Tensor | None, Tensor | None]:
    """Of the operands, in memory like theirs, None where not needed; from that of the result, flat and as an image."""
    if operands.image.ndim == 4:
        found = library_gradients(image, *operands, padding, options.needs_input, options.needs_weight)
        of_image, of_kernel = (None if one is None else channels_last(one) for one in found)
        return of_image, of_kernel
    return (
        torch.mm(result, operands.kernel) if options.needs_input else None,
        torch.mm(result.t(), operands.image) if options.needs_weight else None,
    )


def _image(flat: Tensor, first: int, shape: tuple[int, int, int, int]) -> Tensor:
    """[B, C, rows, columns], channels-last, from row ``first`` on of [..., C], contiguous."""
    _, channels, rows, columns = shape
    strides = rows * columns * channels, 1, columns * channels, channels
    return flat.as_strided(shape, strides, flat.storage_offset() + first * channels)


def _empty(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Of the same batch and grid, channels-last."""
    batch, _, height, width = like.shape
    shape = batch, channels, height, width
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
