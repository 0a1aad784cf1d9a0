"""The products of one step of the sampler: all affine operations of a level, for all its positions, in one launch.

A position is row r and column c of a sample's grid. Along a front step t takes those with c + skew r = t, and what an
operation gave at (r, c) lies at slot t mod span and row r mod rows of its cache, so that all positions of a step read
a tap from one slot. In raster order, which is a SKEW of 0, step t takes all of row t, and a cache has no slots. What
lies beside the grid is never read: it is masked to zero.

The depth of an operation is cut into parts, which are added in their order by what follows. A part is one sum of a
program, over the same blocks of depth in the same order for every number of positions: so are its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of tables, in numbers. An item is some depth of a product for a tile of columns; a program some consecutive items.
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
def _add_products(acc, x_ptrs, x_plane, w_ptrs, w_plane, mask, PLANES: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc [N, M] + w x for blocks x [K, M] and w [N, K] of as many planes, see `_product_kernel`."""
    x = tl.load(x_ptrs, mask=mask, other=0.0)  # [K, M]
    w = tl.load(w_ptrs)  # [N, K]
    if PLANES == 1:
        return _dot(w, x, acc, INTERPRETED)
    x_middle = tl.load(x_ptrs + x_plane, mask=mask, other=0.0)  # [K, M]
    w_middle = tl.load(w_ptrs + w_plane)  # [N, K]
    x_low = tl.load(x_ptrs + 2 * x_plane, mask=mask, other=0.0)  # [K, M]
    w_low = tl.load(w_ptrs + 2 * w_plane)  # [N, K]
    # Smallest first, and a sum of its own: tensor cores cut off what they add to.
    part = _dot(w_middle, x_middle, tl.zeros_like(acc), INTERPRETED)  # [N, M]
    part = _dot(w_low, x, part, INTERPRETED)
    part = _dot(w, x_low, part, INTERPRETED)
    part = _dot(w_middle, x, part, INTERPRETED)
    part = _dot(w, x_middle, part, INTERPRETED)
    return acc + _dot(w, x, part, INTERPRETED)


@triton.jit
def _dot(w, x, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # Triton's interpreter multiplies bfloat16 as integers.
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(w, x, acc)


@triton.jit
def _store(out_ptr, acc, columns, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores a block [N, M] as [M, columns], in pieces that registers have room for beside it."""
    if BLOCK_M > 64:
        first, second = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split()
        _store(out_ptr, first, columns, column, BLOCK_M // 2, BLOCK_N)
        _store(out_ptr + BLOCK_M // 2 * columns, second, columns, column, BLOCK_M // 2, BLOCK_N)
    else:
        offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[None, :] * columns + offs_n[:, None]  # [BLOCK_N, BLOCK_M]
        tl.store(out_ptrs, acc, mask=(offs_n < columns - column)[:, None])


@triton.jit
def _product_kernel(
    step_ptr, features_ptr, weights_ptr, partials_ptr, items_ptr, programs_ptr, batch, plane,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SKEW: tl.constexpr, PLANES: tl.constexpr, INTERPRETED: tl.constexpr,
    UNIT: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of products [positions, columns] of program 1 of the grid, for a block of positions.

    Features and weights are bfloat16. With three PLANES they are three parts of float32 numbers, each what those
    before it leave; features have them ``plane`` numbers apart. Offsets and strides of features count UNIT channels, in
    32 bits. If that is BLOCK_K, every vector is padded with zeros to a multiple of it. Weights lie in tiles [planes,
    PACKED, BLOCK_K] in the order in which they are read, padded with zeros; a program has BLOCK_N columns of a tile.

    Columns are the rows of a product, of which tensor cores take 64 or more at a time, and positions its columns.
    """
    step = tl.load(step_ptr)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row, col, sample, mask_m = positions(step, offs_m, batch, HEIGHT, WIDTH, SKEW)  # [BLOCK_M] each
    if has_positions(step, tl.program_id(0) * BLOCK_M, batch, HEIGHT, WIDTH, SKEW):
        row = tl.where(mask_m, row, -HEIGHT)  # [BLOCK_M], above all that is read
        program = programs_ptr + tl.program_id(1) * _PROGRAM_FIELDS
        offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [BLOCK_N, BLOCK_M]
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
            tile_ptrs = weights_ptr + tl.load(item + 13) * (PLANES * PACKED * BLOCK_K) + tl.load(item + 15) * BLOCK_K
            tile_ptrs += offs_n[:, None] * BLOCK_K + offs_k[None, :]  # [BLOCK_N, BLOCK_K]
            first = tl.load(item + 11).to(tl.int32)
            inner = first % chunks
            right = left + first // chunks % tap_width
            down = top + first // chunks // tap_width
            last_slot = step % span
            ring_row = row % rows  # [BLOCK_M]
            offs_here = base + sample * sample_stride + ring_row * row_stride + col * col_stride  # [BLOCK_M]
            for chunk in range(first, tl.load(item + 12).to(tl.int32)):
                # What is read is at most span - 1 steps old.
                slot = last_slot + SKEW * down + right
                slot = tl.where(slot < 0, slot + span, slot)
                offs_tap = down * row_stride + right * col_stride + slot * slot_stride + inner * (BLOCK_K // UNIT)
                offs = offs_here + tl.where(ring_row < -down, rows * row_stride, 0) + offs_tap  # [BLOCK_M]
                # As an unsigned number what is left of the grid is beyond its right end.
                mask = (row >= -down) & ((col + right).to(tl.uint32, bitcast=True) < WIDTH)  # [BLOCK_M]
                x_ptrs = features_ptr + (offs.to(tl.int64) * UNIT)[None, :] + offs_k[:, None]  # [BLOCK_K, BLOCK_M]
                mask_x = mask[None, :]
                if UNIT != BLOCK_K:
                    mask_x &= (offs_k < channels - inner * BLOCK_K)[:, None]  # [BLOCK_K, BLOCK_M]
                w_ptrs = tile_ptrs + chunk * (PLANES * PACKED * BLOCK_K)  # [BLOCK_N, BLOCK_K]
                acc = _add_products(
                    acc, x_ptrs, plane.to(tl.int64), w_ptrs, PACKED * BLOCK_K, mask_x, PLANES, INTERPRETED
                )
                # Of the next chunk. A branch would keep loads from being made ahead.
                inner = tl.where(inner + 1 < chunks, inner + 1, 0)
                right = tl.where(inner > 0, right, right + 1)
                down = tl.where(right < left + tap_width, down, down + 1)
                right = tl.where(right < left + tap_width, right, left)
        columns = tl.load(program + 3).to(tl.int32)
        column = tl.load(program + 4).to(tl.int32)
        out_ptr = partials_ptr + tl.load(program + 2) + tl.program_id(0).to(tl.int64) * BLOCK_M * columns + column
        _store(out_ptr, acc, columns, column, BLOCK_M, BLOCK_N)
