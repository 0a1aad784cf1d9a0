"""Masked convolution by the library's convolutions on the taps that are read, between Triton kernels.

The rows above and the current row are a convolution each, as in `fastvq.ops.causal_conv.library`. One kernel takes
their taps out of the weights; one activates x and lays it out so that neither needs a copy or a tap of zeros; another
adds the two results, bias, context, gate and residual. The backward pass is the same in reverse. Kernels are imported
with the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.kernels.taps import CHANNEL_MULTIPLE, read_taps
from fastvq.ops.causal_conv.library import channels_last, empty_image, library_gradients
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options

if TYPE_CHECKING:
    from fastvq.kernels.causal_surroundings import Layout


# Shape, strides and offset of a tensor in memory that holds several.
_View = tuple[tuple[int, ...], tuple[int, ...], int]


class _Part(NamedTuple):
    """One of the two convolutions: its segment of taps, how x lies in its input, the library's padding; its operands.

    They are [B, C, rows, columns] and [O, C, rows, columns], channels-last; or, where one tap makes it a matrix
    product, [positions, C] and [O, C].
    """

    segment: int
    layout: Layout
    padding: tuple[int, int]
    image: _View
    kernel: _View


class _Plan(NamedTuple):
    """The parts that read anything of the grid, and to how many outputs and channels they are filled up.

    Taps are packed in segments, those of the rows above and those of the current row, of so many each.
    """

    parts: tuple[_Part, ...]
    layouts: tuple[Layout, ...]
    segments: tuple[int, ...]
    outputs: int
    depth: int
    result: tuple[tuple[int, ...], tuple[int, ...]]


# Of the parts; none where nothing is multiplied.
Kernels = tuple[Tensor, ...]


class Known(NamedTuple):
    """What a block of several convolutions knows or wants beyond what one of them does.

    Attributes:
        kernels: what `pack` made of the weight.
        sums: of the gradient of the result over some of its positions each, float32 [splits, O].
        residual: to be added to the gradient of x.
        sums_input: whether the gradient of x is to be summed too.
    """

    kernels: Kernels = ()
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
    kernels: Kernels = (),
) -> tuple[Tensor, Tensor | None]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W].

    ``kernels`` are what `pack` made of the weight, if it has been called.
    """
    around, _ = _triton()
    x = channels_last(x)
    channels, dtype = weight.shape[0], options.dtype or x.dtype
    plan = _plan(x.shape, weight.shape, options.mask, options.form, dtype)
    whole, found = around.Layout(*x.shape[2:]), []
    plain = not options.gate and context is None and residual is None
    alone = plain and len(plan.parts) == 1 and plan.outputs == channels
    kernels = kernels or pack(x, weight, options)
    for part, image, kernel in zip(plan.parts, _images(x, kernels, options, plan), kernels, strict=False):
        if image.ndim == 4:
            found.append((channels_last(F.conv2d(image, kernel, padding=part.padding)), whole))
        elif alone:
            out = torch.mm(image, kernel.t()) if bias is None else torch.addmm(bias.to(dtype), image, kernel.t())
            return out.as_strided(*plan.result), None
        else:
            found.append((torch.mm(image, kernel.t()), whole))
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = empty_image(x, channels // 2 if options.gate else channels, wide)
    pre_gate = empty_image(x, channels, dtype) if options.gate and options.keep else None
    surroundings = around.Surroundings(
        bias=None if bias is None else bias.contiguous(),
        context=None if context is None else channels_last(context),
        residual=None if residual is None else channels_last(residual),
        gate=options.gate,
    )
    around.join(out, found, plan.outputs, surroundings, pre_gate)
    return out, pre_gate


def pack(x: Tensor, weight: Tensor, options: Options | GradientOptions) -> Kernels:
    """The parts' kernels."""
    dtype = options.dtype or x.dtype
    plan = _plan(x.shape, weight.shape, options.mask, options.form, dtype)
    if not plan.parts or x.numel() == 0:
        return ()
    packed = _triton()[1].pack(weight, plan.segments, plan.outputs, plan.depth, dtype)
    return tuple(_views(packed, [part.kernel for part in plan.parts]))


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
    around, taps = _triton()
    x = channels_last(x)
    outputs, dtype = weight.shape[0], options.dtype or x.dtype
    plan = _plan(x.shape, weight.shape, options.mask, options.form, dtype)
    before = None if pre_gate is None else channels_last(pre_gate)
    summed = options.needs_weight and known.sums is None
    result, sums = around.begin_backward(channels_last(grad), before, plan.outputs, dtype, summed=summed)
    image = result.as_strided(*plan.result)
    of_x = of_weight = of_bias = of_result = of_input = None
    if pre_gate is not None:
        of_result = image if plan.outputs == outputs else image[:, :outputs]
    of_images: list[tuple[Tensor, Layout]] = []
    of_kernels: list[Tensor | None] = [None for _ in plan.segments]
    if options.needs_input or options.needs_weight:
        kernels = known.kernels or pack(x, weight, options)
        images = _images(x, kernels, options, plan, needed=options.needs_weight)
        for part, given, kernel in zip(plan.parts, images, kernels, strict=False):
            found = _gradients(result, image, given, kernel, part.padding, options)
            of_image, of_kernels[part.segment] = found
            if of_image is not None:
                of_images.append((of_image, part.layout))
    if options.needs_weight:
        sums = sums if known.sums is None else known.sums
        of_weight, of_bias = taps.unpack(of_kernels, plan.segments, plan.depth, sums, weight)
    if options.needs_input:
        of_x, kind = empty_image(x, x.shape[1], x.dtype), around.ACTIVATION_KINDS[options.activation]
        residual = None if known.residual is None else channels_last(known.residual)
        surroundings = around.Surroundings(residual=residual, given=x if kind else None, derivative=kind)
        of_input = around.join(of_x, of_images, plan.depth, surroundings, summed=known.sums_input)
    return (of_x, of_weight, of_bias, of_result), of_input


@functools.cache
def _triton() -> tuple[Any, Any]:
    """The modules `causal_surroundings` and `causal_conv_taps`."""
    from fastvq.kernels import causal_conv_taps, causal_surroundings

    return causal_surroundings, causal_conv_taps


@functools.lru_cache(maxsize=1024)
def _plan(x: torch.Size, weight: torch.Size, mask: str, form: str, dtype: torch.dtype) -> _Plan:
    """For x [B, C, H, W], whose grid is that of the parts' results, and weight [O, C', k, k]."""
    from fastvq.kernels.causal_surroundings import Layout

    batch, _, height, width = x
    taps = read_taps(weight[-1], mask, form)
    kernel, above, left, _ = taps
    outputs, depth = (size + -size % CHANNEL_MULTIPLE for size in weight[:2])
    segments = tuple(count for count in (above * kernel, taps.current) if count)
    shapes = []
    if above and height > 1:
        # Row 0 reads zeros alone, and the last row is not read. Columns outside are the library's own padding where
        # it is the same on both sides.
        odd = kernel % 2 == 1
        columns, right = (width, 0) if odd else (width + kernel - 1, left)
        shapes.append((0, above, kernel, Layout(height - 1 + above, columns, above, right), (0, left if odd else 0)))
    if taps.current:
        # What lies behind the mask at the end of a row is left out.
        layout = Layout(height, width + taps.current - 1, 0, left)
        shapes.append((len(segments) - 1, 1, taps.current, layout, (0, 0)))
    parts, first = [], 0
    for segment, rows, columns, layout, padding in shapes:
        tap = outputs * sum(segments[:segment])
        # How precise convolutions of float32 are is not how precise matrix products are.
        views = _rows if rows * columns == 1 and dtype != torch.float32 else _image
        image = views(first, (batch, depth, layout.rows, layout.columns))
        parts.append(_Part(segment, layout, padding, image, views(tap, (outputs, depth, rows, columns))))
        first += batch * layout.rows * layout.columns
    layouts = tuple(part.layout for part in parts)
    return _Plan(tuple(parts), layouts, segments, outputs, depth, _image(0, (batch, outputs, height, width))[:2])


def _images(
    x: Tensor, kernels: Kernels, options: Options | GradientOptions, plan: _Plan, needed: bool = True
) -> list[Tensor]:
    """The parts' images, or none without kernels.

    ``needed``: the library asks for them even where only their shape matters.
    """
    if not kernels:
        return []
    around, dtype = _triton()[0], kernels[0].dtype
    if needed:
        flat = around.spread(x, around.ACTIVATION_KINDS[options.activation], plan.layouts, plan.depth, dtype)
    else:
        positions = x.shape[0] * sum(layout.rows * layout.columns for layout in plan.layouts)
        flat = x.new_empty((positions, plan.depth), dtype=dtype)
    return _views(flat, [part.image for part in plan.parts])


def _views(flat: Tensor, views: Sequence[_View]) -> list[Tensor]:
    start = flat.storage_offset()
    return [flat.as_strided(shape, strides, start + offset) for shape, strides, offset in views]


def _gradients(
    result: Tensor,
    result_image: Tensor,
    image: Tensor,
    kernel: Tensor,
    padding: tuple[int, int],
    options: GradientOptions,
) -> tuple[Tensor | None, Tensor | None]:
    """Of image and kernel, in memory like theirs, None where not needed; from that of the result, in both forms."""
    if image.ndim == 4:
        given = result_image, image, kernel, padding
        found = library_gradients(*given, options.needs_input, options.needs_weight)
        of_image, of_kernel = (None if one is None else channels_last(one) for one in found)
        return of_image, of_kernel
    return (
        torch.mm(result, kernel) if options.needs_input else None,
        torch.mm(result.t(), image) if options.needs_weight else None,
    )


def _image(first: int, shape: tuple[int, int, int, int]) -> _View:
    """[B, C, rows, columns], channels-last, from row ``first`` on of [..., C], contiguous."""
    _, channels, rows, columns = shape
    return shape, (rows * columns * channels, 1, columns * channels, channels), first * channels


def _rows(first: int, shape: tuple[int, int, int, int]) -> _View:
    """The same as [B * rows * columns, C]."""
    batch, channels, rows, columns = shape
    return (batch * rows * columns, channels), (channels, 1), first * channels
