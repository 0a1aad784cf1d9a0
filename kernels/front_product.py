"""The products of one step of the sampler: all affine operations of a level, for all its positions, in one launch.

A position is row r and column c of a sample's grid. Along a front step t takes those with c + skew r = t, and what an
operation gave at (r, c) lies at slot t mod span and row r mod rows of its cache, so that all positions of a step read
a tap from one slot. In raster order, which is a SKEW of 0, step t takes all of row t, and a cache has no slots. What
lies beside the grid is never read: it is masked to zero.

The depth of an operation is cut into parts, and consecutive parts into groups. A part is one chain of additions in
tensor cores; parts of a group are added in their order, and then groups in theirs. A program computes one part, or one
group where there are positions enough to fill the chip that way: the sums are the same, and with tiles of one size so
are their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvq.kernels.causal_conv_product import multiply

# Of tables, in numbers. An item is a part of a product for a tile of columns; a program some consecutive items.
ITEM_FIELDS, PROGRAM_FIELDS = 16, 8
_ITEM_FIELDS: tl.constexpr = tl.constexpr(ITEM_FIELDS)
_PROGRAM_FIELDS: tl.constexpr = tl.constexpr(PROGRAM_FIELDS)


@triton.jit
def first_row(step, WIDTH: tl.constexpr, SKEW: tl.constexpr):
    """The topmost row that has a position in this step."""
    return tl.maximum(step - WIDTH + SKEW, 0) // SKEW


@triton.jit
def positions(step, offs_m, batch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr):
    """Row, column and sample of the positions of a step, and which of them exist; all [M]."""
    if SKEW == 0:
        mask = offs_m < batch * WIDTH  # [M]
        sample = tl.minimum(offs_m // WIDTH, batch - 1)  # [M]
        row = step + sample * 0  # [M]
        col = offs_m % WIDTH  # [M]
    else:
        sample = offs_m % batch  # [M]
        row = first_row(step, WIDTH, SKEW) + offs_m // batch  # [M]
        col = step - SKEW * row  # [M]
        mask = (row < HEIGHT) & (col >= 0)  # [M]
    return row, col, sample, mask


@triton.jit
def has_positions(step, first, batch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr):
    """Whether any position of a step from this one on exists."""
    if SKEW == 0:
        found = first < batch * WIDTH
    else:
        row = first_row(step, WIDTH, SKEW) + first // batch
        found = (row < HEIGHT) & (step >= SKEW * row)
    return found


@triton.jit
def _product_kernel(
    step_ptr, features_ptr, weights_ptr, partials_ptr, items_ptr, programs_ptr, batch,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of products [positions, columns] of program 1 of the grid, for a block of positions.

    Offsets and strides of features count UNIT channels, in 32 bits. If that is BLOCK_K, every vector is padded with
    zeros to a multiple of it. Features are rounded to the type of the weights, if that is another one. Weights lie in
    tiles [BLOCK_K, BLOCK_N] in the order in which they are read, padded with zeros.
    """
    step = tl.load(step_ptr)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, col, sample, mask_m = positions(step, offs_m, batch, HEIGHT, WIDTH, SKEW)  # [BLOCK_M] each
    if has_positions(step, tl.program_id(0) * BLOCK_M, batch, HEIGHT, WIDTH, SKEW):
        program = programs_ptr + tl.program_id(1) * _PROGRAM_FIELDS
        offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
        for index in range(tl.load(program), tl.load(program + 1)):
            item = items_ptr + index * _ITEM_FIELDS
            base = tl.load(item).to(tl.int32)
            span = tl.load(item + 1).to(tl.int32)
            slot_stride = tl.load(item + 2).to(tl.int32)
            rows = tl.load(item + 3).to(tl.int32)
            row_stride = tl.load(item + 4).to(tl.int32)
            sample_stride = tl.load(item + 5).to(tl.int32)
            col_stride = tl.load(item + 6).to(tl.int32)
            top = tl.load(item + 7).to(tl.int32)
            left = tl.load(item + 8).to(tl.int32)
            tap_width = tl.load(item + 9).to(tl.int32)
            chunks = tl.load(item + 10).to(tl.int32)
            channels = tl.load(item + 14).to(tl.int32)
            tile_ptrs = weights_ptr + tl.load(item + 13) * (BLOCK_K * BLOCK_N)
            tile_ptrs += offs_k[:, None] * BLOCK_N + offs_n[None, :]  # [BLOCK_K, BLOCK_N]
            ring_row = row % rows  # [BLOCK_M]
            offs_sample = base + sample * sample_stride  # [BLOCK_M]
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
            for chunk in range(tl.load(item + 11).to(tl.int32), tl.load(item + 12).to(tl.int32)):
                tap = chunk // chunks
                down = top + tap // tap_width
                right = left + tap % tap_width
                slot = (step + SKEW * down + right) % span
                from_row = ring_row + down  # [BLOCK_M]
                from_row = tl.where(from_row < 0, from_row + rows, from_row)  # [BLOCK_M]
                offs = offs_sample + from_row * row_stride + (col + right) * col_stride  # [BLOCK_M]
                offs += slot * slot_stride + chunk % chunks * (BLOCK_K // UNIT)
                mask = mask_m & (row + down >= 0) & (col + right >= 0) & (col + right < WIDTH)  # [BLOCK_M]
                a_ptrs = features_ptr + (offs.to(tl.int64) * UNIT)[:, None] + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
                mask_a = mask[:, None]
                if UNIT != BLOCK_K:
                    mask_a &= (offs_k < channels - chunk % chunks * BLOCK_K)[None, :]  # [BLOCK_M, BLOCK_K]
                a = tl.load(a_ptrs, mask=mask_a, other=0.0)  # [BLOCK_M, BLOCK_K]
                b = tl.load(tile_ptrs + chunk * (BLOCK_K * BLOCK_N))  # [BLOCK_K, BLOCK_N]
                acc = multiply(a.to(b.dtype), b, acc, PRECISION)  # [BLOCK_M, BLOCK_N]
            total += acc
        columns = tl.load(program + 3)
        offs_column = tl.load(program + 4) + offs_n  # [BLOCK_N]
        out_ptrs = partials_ptr + tl.load(program + 2) + offs_m[:, None] * columns + offs_column[None, :]
        tl.store(out_ptrs, total, mask=mask_m[:, None] & (offs_column < columns)[None, :])
