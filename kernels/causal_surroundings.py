"""What surrounds a convolution in a gated residual block, on a GPU: activation before, bias, gate and sums after it.

`finish` ends the kernel of a product of ours. Around the library's convolutions, which take a masked kernel in two
parts, the rows above and the current row, there are three kernels: `spread` activates x and lays it out as each part
reads it, `join` adds the parts' results and finishes, and in the backward pass it adds the gradients of the two layouts
and finishes with the activation's derivative; `gate_backward` begins the backward pass and sums the bias's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.kernels.elementary import elu_pair, exp_negative, sigmoid, sigmoids
from fastvq.kernels.launch import hardware, on_device

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


def surrounding_tiles(channels: int, item: int) -> Tiles:
    """Tiles of `spread`, `join` and `gate_backward`: rows as wide as there are channels, of up to 128 bytes."""
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


@triton.jit
def _halves(block):
    """The left and the right half of the columns of a block [M, N]."""
    pairs = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])  # [M, 2, N / 2]
    return tl.split(tl.permute(pairs, [0, 2, 1]))  # [M, N / 2] twice


@triton.jit
def finish(
    acc, other, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
    offs_m, image, first_n, positions, columns,
    PAIR: tl.constexpr, GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
):  # fmt: skip
    """What follows the products acc and other [M, N], for columns ``first_n`` onwards.

    ``offs_m`` and ``image``, [M], say of which positions and images.
    """
    if acc.shape[1] * out_ptr.dtype.element_ty.primitive_bitwidth > _FINISHED_BITS:
        left, right = _halves(acc)  # [M, N / 2] each
        other_left, other_right = _halves(other) if PAIR else (left, right)  # [M, N / 2] each
        finish(
            left, other_left, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
            offs_m, image, first_n, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
        )  # fmt: skip
        finish(
            right, other_right, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
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


@triton.jit
def _spread_kernel(
    x_ptr, out_ptr, height, width, channels, total, of_first,
    rows_a, columns_a, down_a, right_a, rows_b, columns_b, down_b, right_b,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Two layouts, one after the other in out [total, K], of activated x [images, height, width, channels].

    The first has ``of_first`` positions. K is ``channels``, or twice as many for concat-ELU.
    """
    blocks = tl.cdiv(channels, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_first = offs_m < of_first  # [BLOCK_M]
    local = tl.where(in_first, offs_m, offs_m - of_first)  # [BLOCK_M]
    rows, columns = tl.where(in_first, rows_a, rows_b), tl.where(in_first, columns_a, columns_b)  # [BLOCK_M] each
    line = local // columns  # [BLOCK_M]
    row = line % rows - tl.where(in_first, down_a, down_b)  # [BLOCK_M]
    col = local % columns - tl.where(in_first, right_a, right_b)  # [BLOCK_M]
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width) & (offs_m < total)  # [BLOCK_M]
    mask_n = offs_n < channels  # [BLOCK_N]
    place = ((line // rows).to(tl.int64) * height + row) * width + col  # [BLOCK_M]
    x_ptrs = x_ptr + place[:, None] * channels + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    value = tl.load(x_ptrs, mask=inside[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
    depth = channels * 2 if KIND == CONCAT_ELU else channels
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * depth + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    mask = (offs_m < total)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
    if KIND == 0:
        tl.store(out_ptrs, value, mask=mask)
    else:
        # [BLOCK_M, BLOCK_N] each.
        positive, negative = elu_pair(value.to(tl.float32), x_ptr.dtype.element_ty == tl.float32)
        tl.store(out_ptrs, positive, mask=mask)
        if KIND == CONCAT_ELU:
            tl.store(out_ptrs + channels, negative, mask=mask)


@triton.jit
def _add_part(
    acc, other, part_ptr, offs_m, offs_n, mask_n, height, width, rows, columns, down, right, channels, second,
    PAIR: tl.constexpr,
):  # fmt: skip
    """acc and, with PAIR, other, [M, N], and what a part holds of these positions there and ``second`` channels on."""
    line = offs_m // width  # [M]
    row, col = line % height + down, offs_m % width + right  # [M] each
    place = ((line // height).to(tl.int64) * rows + row) * columns + col  # [M]
    part_ptrs = part_ptr + place[:, None] * channels + offs_n[None, :]  # [M, N]
    mask = ((row < rows) & (col < columns))[:, None] & mask_n  # [M, N]
    acc += tl.load(part_ptrs, mask=mask, other=0.0).to(tl.float32)  # [M, N]
    if PAIR:
        other += tl.load(part_ptrs + second, mask=mask, other=0.0).to(tl.float32)  # [M, N]
    return acc, other


@triton.jit
def _join_kernel(
    part_a_ptr, part_b_ptr, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
    positions, height, width, columns,
    rows_a, columns_a, down_a, right_a, rows_b, columns_b, down_b, right_b,
    GATE: tl.constexpr, DERIVATIVE: tl.constexpr, SAMPLE_CONTEXT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [positions, columns]: `finish` of the sum of two parts, each in its layout; either may be None."""
    PAIR: tl.constexpr = GATE or DERIVATIVE == CONCAT_ELU
    blocks = tl.cdiv(columns, BLOCK_N)
    offs_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first_n = tl.program_id(0) % blocks * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (offs_m < positions)[:, None] & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    channels = columns * 2 if PAIR else columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    if part_a_ptr is not None:
        acc, other = _add_part(
            acc, other, part_a_ptr, offs_m, offs_n, mask, height, width, rows_a, columns_a, down_a, right_a,
            channels, columns, PAIR,
        )  # fmt: skip
    if part_b_ptr is not None:
        acc, other = _add_part(
            acc, other, part_b_ptr, offs_m, offs_n, mask, height, width, rows_b, columns_b, down_b, right_b,
            channels, columns, PAIR,
        )  # fmt: skip
    image = (offs_m // width // height).to(tl.int64)  # [BLOCK_M]
    finish(
        acc, other, bias_ptr, context_ptr, residual_ptr, given_ptr, out_ptr, pre_gate_ptr,
        offs_m, image, first_n, positions, columns, PAIR, GATE, DERIVATIVE, SAMPLE_CONTEXT,
    )  # fmt: skip


@triton.jit
def _gate_backward_kernel(
    grad_ptr, pre_gate_ptr, out_ptr, sums_ptr, positions, channels, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [positions, 2 channels], and its sums over ``span`` positions each, [splits, 2 channels]."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < channels  # [BLOCK_N]
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, positions)
    sum_a = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
    sum_b = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (offs_m < last)[:, None] & mask_n[None, :]  # [BLOCK_M, BLOCK_N]
        offs = offs_m.to(tl.int64)[:, None] * channels + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
        offs_wide = offs_m.to(tl.int64)[:, None] * (2 * channels) + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
        value = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        a = tl.load(pre_gate_ptr + offs_wide, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        b = tl.load(pre_gate_ptr + offs_wide + channels, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        gate, rest = sigmoids(b)  # [BLOCK_M, BLOCK_N] each
        of_a, of_b = value * gate, value * a * gate * rest  # [BLOCK_M, BLOCK_N] each
        tl.store(out_ptr + offs_wide, of_a, mask=mask)
        tl.store(out_ptr + offs_wide + channels, of_b, mask=mask)
        sum_a += tl.sum(of_a, axis=0)  # [BLOCK_N]
        sum_b += tl.sum(of_b, axis=0)  # [BLOCK_N]
    sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * (2 * channels) + offs_n  # [BLOCK_N]
    tl.store(sums_ptrs, sum_a, mask=mask_n)
    tl.store(sums_ptrs + channels, sum_b, mask=mask_n)


def spread(x: Tensor, kind: int, *layouts: Layout) -> tuple[Tensor, ...]:
    """Activated x [B, H, W, C], contiguous, once for each of one or two layouts: [B, rows, columns, C or 2 C]."""
    batch, height, width, channels = x.shape
    depth = channels * max(1, kind)
    sizes = [batch * layout.rows * layout.columns for layout in layouts]
    total = sum(sizes)
    out = x.new_empty((total, depth))
    if out.numel():
        require_countable("x: expected positions", total)
        tiles = surrounding_tiles(channels, x.element_size())
        blocks = triton.cdiv(total, tiles.block_m) * triton.cdiv(channels, tiles.block_n)
        with on_device(x.device):
            _spread_kernel[(blocks,)](
                x, out, height, width, channels, total, sizes[0], *layouts[0], *layouts[-1],
                KIND=kind, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps,
            )  # fmt: skip
    images = out.split(sizes)
    return tuple(
        image.view(batch, layout.rows, layout.columns, depth) for image, layout in zip(images, layouts, strict=True)
    )


def activated(x: Tensor, kind: int) -> Tensor:
    """ELU or concat-ELU of x [B, H, W, C], contiguous."""
    return spread(x, kind, Layout(x.shape[1], x.shape[2]))[0]


class Surroundings(NamedTuple):
    """What `join` does to the sum: bias, context, gate and residual, or the derivative of the activation of ``given``.

    Images are [B, H, W, channels], contiguous; context may be [B, 1, 1, channels].
    """

    bias: Tensor | None = None
    context: Tensor | None = None
    residual: Tensor | None = None
    gate: bool = False
    given: Tensor | None = None
    derivative: int = 0


def join(
    out: Tensor, parts: tuple[tuple[Tensor, Layout], ...], around: Surroundings, pre_gate: Tensor | None = None
) -> None:
    """Fills out [B, H, W, N], and ``pre_gate`` [B, H, W, 2 N], from up to two parts [B, rows, columns, N or 2 N]."""
    batch, height, width, columns = out.shape
    if out.numel() == 0:
        return
    positions = batch * height * width
    require_countable("x: expected positions", positions)
    (first, first_layout), (second, second_layout) = (*parts, (None, Layout(0, 0)), (None, Layout(0, 0)))[:2]
    context = around.context
    tiles = surrounding_tiles(columns, out.element_size())
    blocks = triton.cdiv(positions, tiles.block_m) * triton.cdiv(columns, tiles.block_n)
    with on_device(out.device):
        _join_kernel[(blocks,)](
            first, second, around.bias, context, around.residual, around.given, out, pre_gate,
            positions, height, width, columns, *first_layout, *second_layout,
            GATE=around.gate, DERIVATIVE=around.derivative,
            SAMPLE_CONTEXT=context is not None and context.shape[1:3] != out.shape[1:3],
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps,
        )  # fmt: skip


@torch.no_grad()
def gate_backward(grad: Tensor, pre_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [B, O, H, W] with respect to ``pre_gate``, channels-last, and its sum over all positions, float64 [O].

    Args:
        grad: [B, O / 2, H, W], gradient of a sigmoid(b).
        pre_gate: [B, O, H, W], a and b.
    """
    grad, pre_gate = nhwc(grad), nhwc(pre_gate)
    out, channels = torch.empty_like(pre_gate), grad.shape[-1]
    if grad.numel() == 0:
        return out.permute(0, 3, 1, 2), out.new_zeros(2 * channels, dtype=torch.float64)
    positions = grad.numel() // channels
    require_countable("x: expected positions", positions)
    tiles = surrounding_tiles(channels, out.element_size())
    blocks = triton.cdiv(channels, tiles.block_n)
    # Sixteen programs on each multiprocessor keep memory busy.
    splits = max(1, 16 * hardware(grad.device).processors // blocks)
    span = triton.cdiv(triton.cdiv(positions, tiles.block_m), splits) * tiles.block_m
    splits = triton.cdiv(positions, span)
    sums = grad.new_empty((splits, 2 * channels), dtype=torch.float32)
    with on_device(grad.device):
        _gate_backward_kernel[(blocks, splits)](
            grad, pre_gate, out, sums, positions, channels, span,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2), sums.sum(0, dtype=torch.float64)


def require_countable(what: str, number: int) -> None:
    """Kernels count in 32 bits, up to a block beyond the end."""
    if number > 2**31 - 1024:
        raise ArgumentError(f"{what} to number at most 2^31 - 1024, got {number}")


def nhwc(x: Tensor) -> Tensor:
    """[B, H, W, C], contiguous; a copy unless x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()
