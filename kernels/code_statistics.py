"""Counts, sums and squared error of vectors assigned to codes, on a GPU.

Both forms add in float32 whatever the input type, and in two levels, so that a code that takes every vector does not
mean one long chain of additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.scaled_codes import FUSE

__all__ = ["assignment_statistics"]

# Vectors, and columns, that a program handles at a time.
_ROWS = 32
_BLOCK_D = 32


@triton.jit
def _statistics_kernel(
    x, stride_h, stride_n, codebook, code_stride_h, code_stride_k, indices, mask, sums, counts, errors, keys,
    num_rows, num_codes, width, mask_stride_h, mask_stride_n,
    MASKED: tl.constexpr, ATOMIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squared error of ROWS vectors; with ATOMIC their counts and sums, else the keys to sort by.

    ``indices`` are -1 where there is no code, which becomes 0; with ATOMIC vectors of one code are summed here before
    they are added, so that a code that takes many vectors gets few additions.
    """
    head = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + local
    inside = rows < num_rows
    slots = indices + head * num_rows + rows
    found = tl.load(slots, mask=inside, other=-1)
    code = tl.maximum(found, 0)
    tl.store(slots, code, mask=inside)
    wanted = inside
    if MASKED:
        wanted &= tl.load(mask + head * mask_stride_h + rows * mask_stride_n, mask=inside, other=0) != 0
    keep = wanted & (found >= 0)

    same = (found[:, None] == found[None, :]) & keep[:, None] & keep[None, :]  # [ROWS, ROWS]
    leader = keep & (tl.min(tl.where(same, local[None, :], ROWS), axis=1) == local)
    if ATOMIC:
        tl.atomic_add(counts + head * num_codes + code, tl.sum(same.to(tl.int64), axis=1), mask=leader)
    else:
        tl.store(keys + head * num_rows + rows, tl.where(keep, found, num_codes).to(tl.int32), mask=inside)

    error = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = wanted[:, None] & (d < width)[None, :]
        values = tl.load(x + head * stride_h + rows[:, None] * stride_n + d[None, :], mask=there, other=0.0)
        values = values.to(tl.float32)
        chosen = tl.load(
            codebook + head * code_stride_h + code[:, None] * code_stride_k + d[None, :], mask=there, other=0.0
        )
        gap = values - chosen.to(tl.float32)
        error += tl.sum(gap * gap, axis=1)
        if ATOMIC:
            # Rows that are left out may hold NaN, which a product with zero would keep.
            values = tl.where(keep[:, None], values, 0.0)
            grouped = tl.dot(same.to(tl.float32), values, input_precision="ieee")
            places = sums + (head * num_codes + code)[:, None] * width + d[None, :]
            tl.atomic_add(places, grouped, mask=leader[:, None] & (d < width)[None, :])
    tl.store(errors + head * tl.num_programs(0) + tl.program_id(0), tl.sum(error, axis=0))


@triton.jit
def _segment_sum_kernel(
    x, stride_h, stride_n, order, ends, sums, counts, num_rows, num_codes, width,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the vectors of one code, which lie side by side in ``order``; ROWS chains, then a tree."""
    code = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    ends += head * num_codes + code
    end = tl.load(ends)
    begin = tl.load(ends - 1, mask=code > 0, other=0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(begin, end, ROWS):
        slots = first + tl.arange(0, ROWS)
        rows = tl.load(order + head * num_rows + slots, mask=slots < end, other=0)
        there = (slots < end)[:, None] & (d < width)[None, :]
        values = tl.load(x + head * stride_h + rows[:, None] * stride_n + d[None, :], mask=there, other=0.0)
        total += values.to(tl.float32)
    tl.store(sums + (head * num_codes + code) * width + d, tl.sum(total, axis=0), mask=d < width)
    if tl.program_id(1) == 0:
        tl.store(counts + head * num_codes + code, end - begin)


def assignment_statistics(
    x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error float32 [H], sums float32 [H, K, D] and counts int64 [H, K].

    Args:
        x, codebook: [H, N, D] and [H, K, D], the last axis of stride 1.
        indices: int64 [H, N], contiguous; -1 marks vectors without a code and is replaced by 0. They are left out of
            sums and counts, while their error to code 0 counts.
        mask: bool [H, N]; vectors where it is False are left out of everything.
        deterministic: sorts the vectors by code and adds in that order, instead of atomic additions.
    """
    heads, num_rows, width = x.shape
    num_codes = codebook.shape[1]
    make = x.new_empty if deterministic and num_rows else x.new_zeros
    sums = make((heads, num_codes, width), dtype=torch.float32)
    counts = make((heads, num_codes), dtype=torch.int64)
    if heads == 0 or num_rows == 0:
        return x.new_zeros(heads, dtype=torch.float32), sums, counts
    blocks = triton.cdiv(num_rows, _ROWS)
    errors = x.new_empty((heads, blocks), dtype=torch.float32)
    keys = x.new_empty((heads, num_rows), dtype=torch.int32) if deterministic else indices
    given = indices if mask is None else mask.view(torch.uint8)
    _statistics_kernel[(blocks, heads)](
        x, x.stride(0), x.stride(1), codebook, codebook.stride(0), codebook.stride(1), indices, given, sums, counts,
        errors, keys, num_rows, num_codes, width, given.stride(0), given.stride(1),
        MASKED=mask is not None, ATOMIC=not deterministic, ROWS=_ROWS, BLOCK_D=_BLOCK_D, num_warps=4, **FUSE,
    )  # fmt: skip
    if deterministic:
        ordered, order = torch.sort(keys, dim=1, stable=True)
        codes = torch.arange(num_codes, dtype=torch.int32, device=x.device).expand(heads, -1).contiguous()
        ends = torch.searchsorted(ordered, codes, right=True)
        _segment_sum_kernel[(num_codes, triton.cdiv(width, _BLOCK_D), heads)](
            x, x.stride(0), x.stride(1), order, ends, sums, counts, num_rows, num_codes, width,
            ROWS=_ROWS, BLOCK_D=_BLOCK_D, num_warps=4, **FUSE,
        )  # fmt: skip
    return errors.sum(1), sums, counts
