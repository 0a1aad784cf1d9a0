"""Counts, sums and squared error of vectors assigned to codes, on a GPU.

Both forms add in float32 whatever the input type, and in two levels, so that a code that takes every vector does not
mean one long chain of additions. With atomic additions they are one launch; in a fixed order, a sort, two small
operations of PyTorch and one more launch.

Floor of the one launch, derived from an H200's 4.2 TB/s and not measured: x is read once, 4 N D bytes (16.8 MB and 4 us
at N 65536, D 64, less if the search left it in L2), and N D numbers are added in L2 (4.2 million, some 3 us at a sector
a cycle); the product that groups vectors takes 32 N D multiply-adds of float32 (134 million, 5 us). It took 46 to 59 us
with a fence around every addition and two programs on a multiprocessor instead of four.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.launch import Form, Launcher, form
from fastvq.kernels.scaled_codes import FUSE, HEADER

__all__ = ["assignment_statistics"]

# Vectors, and columns, that a program handles at a time; with twice the columns registers leave two programs on a
# multiprocessor instead of four, which cannot hide each other's latency.
_BLOCK_N = 32
_BLOCK_D = 16
# Errors of programs that the last one adds at a time.
_BLOCK_E = 2048


@triton.jit
def _statistics_kernel(
    x_ptr, codebook_ptr, indices_ptr, mask_ptr, sums_ptr, counts_ptr, crowded_ptr, errors_ptr, error_ptr, keys_ptr,
    x_stride_h, x_stride_n, codebook_stride_h, codebook_stride_k, mask_stride_h, mask_stride_n, num_rows, num_codes,
    width,
    MASKED: tl.constexpr, ATOMIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Squared error of BLOCK_N vectors; with ATOMIC their counts and sums, else the keys to sort by.

    Indices are -1 where there is no code, which becomes 0; with ATOMIC vectors of one code are summed here before
    they are added, so that a code that takes many vectors gets few additions. The last program adds up the errors of
    all, in one order.
    """
    head = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + local  # [BLOCK_N]
    mask_n = offs_n < num_rows  # [BLOCK_N]
    indices_ptrs = indices_ptr + head * num_rows + offs_n  # [BLOCK_N]
    found = tl.load(indices_ptrs, mask=mask_n, other=-1)  # [BLOCK_N]
    offs_code = tl.maximum(found, 0)  # [BLOCK_N]
    wanted = mask_n
    if MASKED:
        mask_ptrs = mask_ptr + head * mask_stride_h + offs_n * mask_stride_n  # [BLOCK_N]
        wanted &= tl.load(mask_ptrs, mask=mask_n, other=0) != 0  # [BLOCK_N]
    keep = wanted & (found >= 0)  # [BLOCK_N]

    same = (found[:, None] == found[None, :]) & keep[:, None] & keep[None, :]  # [BLOCK_N, BLOCK_N]
    leader = keep & (tl.min(tl.where(same, local[None, :], BLOCK_N), axis=1) == local)  # [BLOCK_N]
    if ATOMIC:
        tl.atomic_add(
            counts_ptr + head * num_codes + offs_code, tl.sum(same.to(tl.int64), axis=1), mask=leader, sem="relaxed"
        )
    else:
        keys_ptrs = keys_ptr + head * num_rows + offs_n  # [BLOCK_N]
        tl.store(keys_ptrs, tl.where(keep, found, num_codes).to(tl.int32), mask=mask_n)

    error = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = wanted[:, None] & (offs_d < width)[None, :]  # [BLOCK_N, BLOCK_D]
        x_ptrs = x_ptr + head * x_stride_h + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        values = tl.load(x_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        values = values.to(tl.float32)
        codebook_ptrs = codebook_ptr + head * codebook_stride_h + offs_code[:, None] * codebook_stride_k
        chosen = tl.load(codebook_ptrs + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        gap = values - chosen.to(tl.float32)  # [BLOCK_N, BLOCK_D]
        error += tl.sum(gap * gap, axis=1)  # [BLOCK_N]
        if ATOMIC:
            # Rows that are left out may hold NaN, which a product with zero would keep.
            values = tl.where(keep[:, None], values, 0.0)  # [BLOCK_N, BLOCK_D]
            grouped = tl.dot(same.to(tl.float32), values, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
            # [BLOCK_N, BLOCK_D]
            sums_ptrs = sums_ptr + (head * num_codes + offs_code)[:, None] * width + offs_d[None, :]
            tl.atomic_add(sums_ptrs, grouped, mask=leader[:, None] & (offs_d < width)[None, :], sem="relaxed")
    programs = tl.num_programs(0)
    errors_ptr += head * programs
    tl.store(errors_ptr + tl.program_id(0), tl.sum(error, axis=0))
    # The program's stores come before what its first thread releases with the addition; and all warps have read the
    # indices, of which they hold the same, before one writes.
    tl.debug_barrier()
    tl.store(indices_ptrs, offs_code, mask=mask_n)
    if tl.atomic_add(crowded_ptr + head * (2 * num_rows + HEADER) + 1, 1) == programs - 1:
        total = tl.zeros([BLOCK_E], tl.float32)  # [BLOCK_E]
        for first in range(0, programs, BLOCK_E):
            offs_e = first + tl.arange(0, BLOCK_E)  # [BLOCK_E]
            total += tl.load(errors_ptr + offs_e, mask=offs_e < programs, other=0.0, cache_modifier=".cg")
        tl.store(error_ptr + head, tl.sum(total, axis=0))


@triton.jit
def _segment_sum_kernel(
    x_ptr, order_ptr, ends_ptr, sums_ptr, counts_ptr, x_stride_h, x_stride_n, num_rows, num_codes, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the vectors of one code, which lie side by side in order; BLOCK_N chains, then a tree."""
    code = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    ends_ptr += head * num_codes + code
    end = tl.load(ends_ptr)
    begin = tl.load(ends_ptr - 1, mask=code > 0, other=0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    for first in range(begin, end, BLOCK_N):
        offs_slot = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offs_n = tl.load(order_ptr + head * num_rows + offs_slot, mask=offs_slot < end, other=0)  # [BLOCK_N]
        mask = (offs_slot < end)[:, None] & (offs_d < width)[None, :]  # [BLOCK_N, BLOCK_D]
        x_ptrs = x_ptr + head * x_stride_h + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        values = tl.load(x_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        total += values.to(tl.float32)
    sums_ptrs = sums_ptr + (head * num_codes + code) * width + offs_d  # [BLOCK_D]
    tl.store(sums_ptrs, tl.sum(total, axis=0), mask=offs_d < width)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + head * num_codes + code, end - begin)


def assignment_statistics(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    counts: Tensor,
    crowded: Tensor,
    deterministic: bool,
) -> Tensor:
    """Squared error float32 [H]; adds to sums float32 [H, K, D] and counts int64 [H, K], which are zero.

    Args:
        x, codebook: [H, N, D] and [H, K, D], the last axis of stride 1; N is not 0.
        indices: int64 [H, N], contiguous; -1 marks vectors without a code and is replaced by 0. They are left out of
            sums and counts, while their error to code 0 counts.
        mask: bool [H, N]; vectors where it is False are left out of everything.
        crowded: int32 [H, HEADER + 2 N]; counts in its header which programs are done.
        deterministic: sorts the vectors by code and adds in that order, instead of atomic additions.
    """
    heads, num_rows = x.shape[:2]
    plan = _plan(form(x), form(codebook), None if mask is None else mask.stride(), deterministic)
    errors = x.new_empty((heads, plan.blocks), dtype=torch.float32)
    error = x.new_empty(heads, dtype=torch.float32)
    keys = x.new_empty((heads, num_rows), dtype=torch.int32) if deterministic else None
    bits = None if mask is None else mask.view(torch.uint8)
    plan.launch(x, codebook, indices, bits, sums, counts, crowded, errors, error, keys)
    if keys is not None:
        num_codes = codebook.shape[1]
        ordered, order = torch.sort(keys, dim=1, stable=True)
        codes = torch.arange(num_codes, dtype=torch.int32, device=x.device).expand(heads, -1).contiguous()
        plan.add(x, order, torch.searchsorted(ordered, codes, right=True), sums, counts)
    return error


class _Plan(NamedTuple):
    """Programs, and launches of the statistics and of the sums in order."""

    blocks: int
    launch: Launcher
    add: Launcher


@functools.lru_cache(maxsize=256)
def _plan(x: Form, codebook: Form, mask_strides: tuple[int, ...] | None, deterministic: bool) -> _Plan:
    heads, num_rows, width = x.shape
    num_codes = codebook.shape[1]
    blocks = triton.cdiv(num_rows, _BLOCK_N)
    sizes = num_rows, num_codes, width
    options = {"BLOCK_N": _BLOCK_N, "BLOCK_D": _BLOCK_D, "num_warps": 4, **FUSE}
    constants = {"MASKED": mask_strides is not None, "ATOMIC": not deterministic, "BLOCK_E": _BLOCK_E, "maxnreg": 128}
    numbers = *x.strides[:2], *codebook.strides[:2], *(mask_strides or (0, 0)), *sizes
    launch = Launcher(_statistics_kernel, (blocks, heads), numbers, {**constants, **options})
    grid = num_codes, triton.cdiv(width, _BLOCK_D), heads
    return _Plan(blocks, launch, Launcher(_segment_sum_kernel, grid, (*x.strides[:2], *sizes), options))
