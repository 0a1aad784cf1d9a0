"""What surrounds a convolution in a gated residual block, on a GPU: activation before, bias, gate and sums after it.

`finish` ends the kernel of a product of ours. Around the library's convolutions, which take a masked kernel in two
parts, the rows above and the current row, there are three kernels: `spread` activates x and lays it out as each part
reads it, `join` adds the parts' results and finishes, and in the backward pass it adds the gradients of the two layouts
and finishes with the activation's derivative; `begin_backward` goes back through the gate and sums the bias's gradient.

What the library is given has a ``pitch`` of channels, of which those beyond the image's own are 0: it multiplies at
full rate only where positions begin at multiples of 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.kernels.elementary import elu_pair, exp_negative, sigmoid, sigmoids
from fastvq.kernels.launch import cdiv, hardware, launch

ACTIVATION_KINDS: dict[str | None, int] = {None: 0, "elu": 1, "concat_elu": 2}
CONCAT_ELU: tl.constexpr = tl.constexpr(2)

# Of a row, that what follows a product handles at a time: more would not fit in registers.
_FINISHED_BITS: tl.constexpr = tl.constexpr(1024)


class Tiles(NamedTuple):
    """Positions and channels of a block, and warps."""

    block_m: int
    block_n: int
    warps: int


# 2048 values each.
SURROUNDING_TILES = (Tiles(32, 64, 4), Tiles(64, 32, 4), Tiles(128, 16, 4))


@functools.cache
def surrounding_tiles(channels: int, item: int) -> Tiles:
    """Tiles of `spread`, `join` and `begin_backward`: rows as wide as there are channels, of up to 128 bytes."""
    widest = max(16, min(channels, 128 // item))
    return next(tiles for tiles in SURROUNDING_TILES if tiles.block_n <= widest)


class Layout(NamedTuple):
    """An image of ``rows`` x ``columns`` that holds a grid from its row ``down`` and column ``right`` on.

    What of the grid does not fit is left out, and what it does not cover is 0.
    """

    rows: int
    columns: int
    down: int = 0
    right: int = 0


_NOTHING = None, Layout(0, 0)


@triton.jit
def _halves(block):
    """The left and the right half of the columns of a block [M, N]."""
    pairs = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])  # [M, 2, N / 2]
    return tl.split(tl.permute(pairs, [0, 2, 1]))  # [M, N / 2] twice


@triton.jit
def finish(
    acc, other, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, sums_ptr,
    offs_m, image, first_n, positions, columns,
    PAIR: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
):  # fmt: skip
    """What follows the products acc and other [M, N], for columns ``first_n`` onwards.

    ``offs_m`` and ``image``, [M], say of which positions and images. Unless ``sums_ptr`` is None, sums over these
    positions go there.
    """
    if acc.shape[1] * out_ptr.dtype.element_ty.primitive_bitwidth > _FINISHED_BITS:
        left, right = _halves(acc)  # [M, N / 2] each
        other_left, other_right = _halves(other) if PAIR else (left, right)  # [M, N / 2] each
        finish(
            left, other_left, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, sums_ptr,
            offs_m, image, first_n, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
        )  # fmt: skip
        finish(
            right, other_right, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, sums_ptr,
            offs_m, image, first_n + acc.shape[1] // 2, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
        )  # fmt: skip
    else:
        PRECISE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        offs_n = first_n + tl.arange(0, acc.shape[1])  # [N]
        total = columns * 2 if PAIR else columns
        mask_n = offs_n < columns  # [N]
        mask = (offs_m < positions)[:, None] & (offs_n < columns)[None, :]  # [M, N]
        offs_row = offs_m.to(tl.int64)[:, None]  # [M, 1]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [M, N]
            if PAIR:
                other += tl.load(bias_ptr + columns + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [M, N]
        if context_ptr is not None:
            source = image[:, None] if SAMPLE_CONTEXT else offs_row  # [M, 1]
            context_ptrs = context_ptr + source * total + offs_n[None, :]  # [M, N]
            acc += tl.load(context_ptrs, mask=mask, other=0.0).to(tl.float32)  # [M, N]
            if PAIR:
                other += tl.load(context_ptrs + columns, mask=mask, other=0.0).to(tl.float32)  # [M, N]
        if pre_gate_ptr is not None:
            pre_gate_ptrs = pre_gate_ptr + offs_row * total + offs_n[None, :]  # [M, N]
            tl.store(pre_gate_ptrs, acc, mask=mask)
            tl.store(pre_gate_ptrs + columns, other, mask=mask)
        if GATE:
            acc *= sigmoid(other, PRECISE)  # [M, N]
        if DERIVATIVE != 0:
            given_ptrs = given_ptr + offs_row * columns + offs_n[None, :]  # [M, N]
            value = tl.load(given_ptrs, mask=mask, other=0.0).to(tl.float32)  # [M, N]
            slope = exp_negative(-tl.abs(value), PRECISE)  # [M, N]
            acc *= tl.where(value > 0, 1.0, slope)
            if DERIVATIVE == CONCAT_ELU:
                acc -= other * tl.where(value < 0, 1.0, slope)
        offs = offs_row * columns + offs_n[None, :]  # [M, N]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [M, N]
        tl.store(out_ptr + offs, acc, mask=mask)
        if sums_ptr is not None:
            tl.store(sums_ptr + offs_n, tl.sum(tl.where(mask, acc, 0.0), axis=0), mask=mask_n)


@triton.jit
def _spread_kernel(
    x_ptr, out_ptr, height, width, channels, pitch, total, of_first,
    rows_a, columns_a, down_a, right_a, rows_b, columns_b, down_b, right_b,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Two layouts, one after the other in out [total, pitch], of activated x [images, height, width, channels].

    The first has ``of_first`` positions.
    """
    # Channels of what is written last: concat-ELU's other half, and zeros up to the pitch.
    last = pitch - channels if KIND == CONCAT_ELU else pitch
    blocks = tl.cdiv(last, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_first = offs_m < of_first  # [BLOCK_M]
    local = tl.where(in_first, offs_m, offs_m - of_first)  # [BLOCK_M]
    rows, columns = tl.where(in_first, rows_a, rows_b), tl.where(in_first, columns_a, columns_b)  # [BLOCK_M] each
    line = local // columns  # [BLOCK_M]
    row = line % rows - tl.where(in_first, down_a, down_b)  # [BLOCK_M]
    col = local % columns - tl.where(in_first, right_a, right_b)  # [BLOCK_M]
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width) & (offs_m < total)  # [BLOCK_M]
    place = ((line // rows).to(tl.int64) * height + row) * width + col  # [BLOCK_M]
    x_ptrs = x_ptr + place[:, None] * channels + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    value = tl.load(x_ptrs, mask=inside[:, None] & (offs_n < channels)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * pitch + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    mask = (offs_m < total)[:, None] & (offs_n < last)[None, :]  # [BLOCK_M, BLOCK_N]
    if KIND == 0:
        tl.store(out_ptrs, value, mask=mask)
    else:
        # [BLOCK_M, BLOCK_N] each.
        positive, negative = elu_pair(value.to(tl.float32), out_ptr.dtype.element_ty == tl.float32)
        if KIND == CONCAT_ELU:
            tl.store(out_ptrs, positive, mask=mask & (offs_n < channels)[None, :])
            tl.store(out_ptrs + channels, negative, mask=mask)
        else:
            tl.store(out_ptrs, positive, mask=mask)


@triton.jit
def _add_part(
    acc, other, part_ptr, offs_m, offs_n, mask_n, height, width, rows, columns, down, right, pitch, second,
    PAIR: tl.constexpr,
):  # fmt: skip
    """acc and, with PAIR, other, [M, N], and what a part holds of these positions there and ``second`` channels on."""
    line = offs_m // width  # [M]
    row, col = line % height + down, offs_m % width + right  # [M] each
    place = ((line // height).to(tl.int64) * rows + row) * columns + col  # [M]
    part_ptrs = part_ptr + place[:, None] * pitch + offs_n[None, :]  # [M, N]
    mask = ((row < rows) & (col < columns))[:, None] & mask_n  # [M, N]
    acc += tl.load(part_ptrs, mask=mask, other=0.0).to(tl.float32)  # [M, N]
    if PAIR:
        other += tl.load(part_ptrs + second, mask=mask, other=0.0).to(tl.float32)  # [M, N]
    return acc, other


@triton.jit
def _join_kernel(
    part_a_ptr, part_b_ptr, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, sums_ptr,
    positions, height, width, columns, pitch,
    rows_a, columns_a, down_a, right_a, rows_b, columns_b, down_b, right_b,
    GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [positions, columns]: `finish` of the sum of two parts of that pitch, each in its layout, or None.

    Sums of out over the positions of a block each, [..., columns], unless that is None.
    """
    PAIR: tl.constexpr = GATE or DERIVATIVE == CONCAT_ELU
    blocks = tl.cdiv(columns, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_n = tl.program_id(0) % blocks * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (offs_m < positions)[:, None] & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    if part_a_ptr is not None:
        acc, other = _add_part(
            acc, other, part_a_ptr, offs_m, offs_n, mask, height, width, rows_a, columns_a, down_a, right_a,
            pitch, columns, PAIR,
        )  # fmt: skip
    if part_b_ptr is not None:
        acc, other = _add_part(
            acc, other, part_b_ptr, offs_m, offs_n, mask, height, width, rows_b, columns_b, down_b, right_b,
            pitch, columns, PAIR,
        )  # fmt: skip
    image = (offs_m // width // height).to(tl.int64)  # [BLOCK_M]
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) // blocks * columns
    finish(
        acc, other, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr, sums_ptr,
        offs_m, image, first_n, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
    )  # fmt: skip


@triton.jit
def _begin_kernel(
    grad_ptr, pre_gate_ptr, out_ptr, sums_ptr, positions, channels, pitch, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [positions, pitch] from grad [positions, channels], and its sums over ``span`` positions each.

    With ``pre_gate`` [positions, 2 channels] that is also how many sums [splits, ...] there are. Out or sums may be
    None.
    """
    GATE: tl.constexpr = pre_gate_ptr is not None
    wide = channels * 2 if GATE else channels
    second = pitch - channels if GATE else pitch
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < channels  # [BLOCK_N]
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, positions)
    sum_a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    sum_b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        offs_row = offs_m.to(tl.int64)[:, None]  # [BLOCK_M, 1]
        mask_m = (offs_m < last)[:, None]  # [BLOCK_M, 1]
        mask = mask_m & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
        mask_last = mask_m & (offs_n < second)[None, :]  # [BLOCK_M, BLOCK_N]
        grad_ptrs = grad_ptr + offs_row * channels + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
        value = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        out_ptrs = out_ptr + offs_row * pitch + offs_n[None, :] if out_ptr is not None else None
        if GATE:
            pre_gate_ptrs = pre_gate_ptr + offs_row * wide + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
            a = tl.load(pre_gate_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            b = tl.load(pre_gate_ptrs + channels, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            gate, rest = sigmoids(b)  # [BLOCK_M, BLOCK_N] each
            of_b = value * a * gate * rest  # [BLOCK_M, BLOCK_N]
            value *= gate  # [BLOCK_M, BLOCK_N]
            sum_b += of_b  # [BLOCK_M, BLOCK_N]
            tl.store(out_ptrs, value, mask=mask)
            tl.store(out_ptrs + channels, of_b, mask=mask_last)
        elif out_ptr is not None:
            tl.store(out_ptrs, value, mask=mask_last)
        sum_a += value  # [BLOCK_M, BLOCK_N]
    if sums_ptr is not None:
        sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * wide + offs_n  # [BLOCK_N]
        tl.store(sums_ptrs, tl.sum(sum_a, axis=0), mask=mask_n)
        if GATE:
            tl.store(sums_ptrs + channels, tl.sum(sum_b, axis=0), mask=mask_n)


def spread(x: Tensor, kind: int, layouts: tuple[Layout, ...], pitch: int, dtype: torch.dtype) -> Tensor:
    """Activated x [B, C, H, W], channels-last, once for each of one or two layouts, one after the other.

    Returns:
        [B * rows * columns of all layouts, pitch], of that dtype; x itself where it is that already.
    """
    batch, channels, height, width = x.shape
    sizes = [batch * layout.rows * layout.columns for layout in layouts]
    total = sum(sizes)
    if kind == 0 and pitch == channels and dtype == x.dtype and layouts == (Layout(height, width),):
        return x.as_strided((total, channels), (channels, 1))
    out = x.new_empty((total, pitch), dtype=dtype)
    if total and pitch:
        require_countable("x: expected positions", total)
        tiles = surrounding_tiles(channels, dtype.itemsize)
        last = pitch - channels if kind == 2 else pitch
        launch(
            _spread_kernel, (cdiv(total, tiles.block_m) * cdiv(last, tiles.block_n), 1, 1), x.device,
            (x, out), (height, width, channels, pitch, total, sizes[0], *layouts[0], *layouts[-1]),
            KIND=kind, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps,
        )  # fmt: skip
    return out


def activated(x: Tensor, kind: int) -> Tensor:
    """ELU or concat-ELU of x [B, H, W, C], contiguous."""
    *grid, channels = x.shape
    pitch = channels * max(1, kind)
    out = spread(x.permute(0, 3, 1, 2), kind, (Layout(grid[1], grid[2]),), pitch, x.dtype)
    return out.view(*grid, pitch)


class Surroundings(NamedTuple):
    """What `join` does to the sum: bias, context, gate and residual, or the derivative of the activation of ``given``.

    Images are [B, channels, H, W], channels-last; context may be [B, channels, 1, 1].
    """

    bias: Tensor | None = None
    context: Tensor | None = None
    residual: Tensor | None = None
    gate: bool = False
    given: Tensor | None = None
    derivative: int = 0


def join(
    out: Tensor,
    parts: Sequence[tuple[Tensor, Layout]],
    pitch: int,
    around: Surroundings,
    pre_gate: Tensor | None = None,
    *,
    summed: bool = False,
) -> Tensor | None:
    """Fills out [B, N, H, W], and ``pre_gate`` [B, 2 N, H, W], from up to two parts, [B, rows, columns, pitch] each.

    All of them are channels-last; of parts memory alone matters.

    Returns:
        With ``summed`` float32 sums of out over some of its positions each, [splits, N].
    """
    batch, columns, height, width = out.shape
    positions = batch * height * width
    if positions * columns == 0:
        return out.new_zeros((1, columns), dtype=torch.float32) if summed else None
    require_countable("x: expected positions", positions)
    (first, first_layout), (second, second_layout) = (*parts, _NOTHING, _NOTHING)[:2]
    context = around.context
    tiles = surrounding_tiles(columns, out.element_size())
    splits = cdiv(positions, tiles.block_m)
    sums = out.new_empty((splits, columns), dtype=torch.float32) if summed else None
    launch(
        _join_kernel, (splits * cdiv(columns, tiles.block_n), 1, 1), out.device,
        (first, second, around.bias, context, around.residual, around.given, out, pre_gate, sums),
        (positions, height, width, columns, pitch, *first_layout, *second_layout),
        GATE=around.gate, DERIVATIVE=around.derivative,
        SAMPLE_CONTEXT=context is not None and context.shape[2:] != out.shape[2:],
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps,
    )  # fmt: skip
    return sums


@torch.no_grad()
def gate_backward(grad: Tensor, pre_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [B, O, H, W] with respect to ``pre_gate``, channels-last, and its sum over all positions, float64 [O].

    Args:
        grad: [B, O / 2, H, W], gradient of a sigmoid(b).
        pre_gate: [B, O, H, W], a and b.
    """
    grad, pre_gate = (nhwc(x).permute(0, 3, 1, 2) for x in (grad, pre_gate))
    batch, channels, height, width = pre_gate.shape
    out, sums = begin_backward(grad, pre_gate, channels, pre_gate.dtype, summed=True)
    assert sums is not None
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2), sums.sum(0, dtype=torch.float64)


def begin_backward(
    grad: Tensor, pre_gate: Tensor | None, pitch: int, dtype: torch.dtype, *, summed: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient [B * H * W, pitch] of a convolution's result, and sums over some of its positions each, [splits, O].

    Args:
        grad: [B, O, H, W], channels-last; with ``pre_gate`` [B, O / 2, H, W], gradient of a sigmoid(b).
        pre_gate: [B, O, H, W], channels-last, a and b; or None.
        dtype: of the gradient; sums are float32.
        summed: whether sums are wanted.
    """
    batch, channels, height, width = grad.shape
    positions, wide = batch * height * width, channels if pre_gate is None else 2 * channels
    if pre_gate is None and pitch == channels and dtype == grad.dtype:
        out = grad.as_strided((positions, channels), (channels, 1))
        written = None
    else:
        written = out = grad.new_empty((positions, pitch), dtype=dtype)
    if positions * channels == 0 or (written is None and not summed):
        return out, grad.new_zeros((1, wide), dtype=torch.float32) if summed else None
    require_countable("x: expected positions", positions)
    tiles = surrounding_tiles(channels, dtype.itemsize)
    blocks = cdiv(pitch - wide + channels, tiles.block_n)
    # Sixteen programs on each multiprocessor keep memory busy.
    splits = max(1, 16 * hardware(grad.device).processors // blocks)
    span = cdiv(cdiv(positions, tiles.block_m), splits) * tiles.block_m
    splits = cdiv(positions, span)
    sums = grad.new_empty((splits, wide), dtype=torch.float32) if summed else None
    launch(
        _begin_kernel, (blocks, splits, 1), grad.device,
        (grad, pre_gate, written, sums), (positions, channels, pitch, span),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=2 * tiles.warps,
    )  # fmt: skip
    return out, sums


def require_countable(what: str, number: int) -> None:
    """Kernels count in 32 bits, up to a block beyond the end."""
    if number > 2**31 - 1024:
        raise ArgumentError(f"{what} to number at most 2^31 - 1024, got {number}")


def nhwc(x: Tensor) -> Tensor:
    """[B, H, W, C], contiguous; a copy unless x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()
