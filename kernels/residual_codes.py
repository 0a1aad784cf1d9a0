"""Codes of all levels of a residual quantiser on a GPU, and what training needs of them.

Two kernels serve all levels. `_levels_kernel` keeps a block of vectors on chip as float32 residuals, searches for each
level's codes and subtracts them. Undecided vectors cannot wait for a kernel of their own, as the next level needs their
codes: the program that has one passes over the codes a second time and scores its candidates in float32. The search,
its error bound and its criterion are those of `fastvq.kernels.nearest_code`, level by level, with codes from
`prepare_codes`; which codes are beyond reach is judged by the vectors, the residual of the first level, which are as a
rule longer than later residuals: more codes are then within reach, which costs later levels decided vectors and never a
right code.

`_follow_kernel` goes through the levels again with the codes known, a few columns at a time, adds them up, and sums the
residuals that each level saw; so no residual is ever in memory. Without atomic additions `_ordered_sums_kernel` does
the sums in the order of the vectors.

The kernels were run by the interpreter and compiled ahead for three chips; neither has been timed or run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.launch import Form, Launcher, form, hardware, on_device
from fastvq.kernels.scaled_codes import (
    BEYOND,
    FACTS,
    FUSE,
    Preparation,
    power_of_two,
    preparation,
    scale_exponent,
)
from fastvq.kernels.tuning import planned, tuned

__all__ = ["CANDIDATES", "WIDEST", "Tiles", "level_tiles", "residual_codes", "residual_codes_statistics"]

# Wider residuals have no room in registers.
WIDEST = 256
# As in the search of one level: a row's scale exceeds the codes' by at most 2^20, products count at most 2^60 times.
_LEAST_FACTOR: tl.constexpr = tl.constexpr(-20)
_LARGEST_FACTOR: tl.constexpr = tl.constexpr(60)
# In place of a code: of a vector that takes no part in a level, and of one for which no score is finite.
_ABSENT: tl.constexpr = tl.constexpr(-1)
_NONE: tl.constexpr = tl.constexpr(-2)
# Vectors, and columns, that a program of the sums handles at a time.
_SUM_ROWS = 32
_SUM_COLUMNS = 32


class Tiles(NamedTuple):
    """Block sizes of `_levels_kernel`: vectors, codes; warps and pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


CANDIDATES = (Tiles(64, 64, 8, 3), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2))


def level_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles for vectors of ``width`` and a compute ``capability`` such as 90.

    64 vectors, since residuals stay in registers beside the scores; wider than 128 they leave room for 32.
    """
    fitting = [tiles for tiles in CANDIDATES if width <= 128 or tiles.block_n <= 32]
    sizes = f"d{triton.next_power_of_2(width)} k{triton.next_power_of_2(num_codes)}"
    tiles = tuned("residual_codes", capability, sizes, fitting) or fitting[0]
    return tiles._replace(block_k=min(tiles.block_k, max(16, triton.next_power_of_2(num_codes))))


@triton.jit
def _packed_scores(half_rows, factor, shift, halves_ptr, codes16_ptr, offs_k, offs_d, BLOCK_D: tl.constexpr):
    """Scores [R, BLOCK_K] of rows with codes offs_k, positive, the column in their lowest bits."""
    codes = tl.load(codes16_ptr + offs_k[:, None] * BLOCK_D + offs_d[None, :])  # [BLOCK_K, BLOCK_D]
    acc = tl.dot(half_rows, tl.trans(codes))  # [R, BLOCK_K]
    scores = tl.load(halves_ptr + offs_k)[None, :] - acc * factor[:, None] + shift[:, None]  # [R, BLOCK_K]
    low: tl.constexpr = offs_k.shape[0] - 1
    packed = (scores.to(tl.int32, bitcast=True) & ~low) | (offs_k & low)[None, :]
    return packed.to(tl.float32, bitcast=True)


@triton.jit
def _rescored(
    values, half_rows, centre, factor, scale, limit, unsure, beyond, found, halves_ptr, codes16_ptr, codebook_ptr,
    codebook_stride_k, offs_d, width, num_blocks, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``found`` [R], where ``unsure`` replaced by the candidate of least float32 score."""
    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    least = tl.where(unsure, float("inf"), -float("inf"))  # [R]
    for block in range(num_blocks):
        offs_k = block * BLOCK_K + local  # [BLOCK_K]
        codes = tl.load(codes16_ptr + offs_k[:, None] * BLOCK_D + offs_d[None, :])  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(half_rows, tl.trans(codes))  # [R, BLOCK_K]
        half = tl.load(halves_ptr + offs_k)  # [BLOCK_K]
        candidate = half[None, :] - acc * factor[:, None] <= limit[:, None]  # [R, BLOCK_K]
        candidate = (candidate | (beyond[:, None] & (half == BEYOND)[None, :])) & unsure[:, None]
        left = tl.where(candidate, local[None, :], BLOCK_K)  # [R, BLOCK_K]
        rounds = tl.max(tl.sum((left < BLOCK_K).to(tl.int32), axis=1), axis=0)
        for _step in range(rounds):
            column = tl.min(left, axis=1)  # [R]
            left = tl.where(left == column[:, None], BLOCK_K, left)  # [R, BLOCK_K]
            mask_code = column < BLOCK_K  # [R]
            offs_code = block * BLOCK_K + tl.where(mask_code, column, 0)  # [R]
            codebook_ptrs = codebook_ptr + offs_code.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]
            there = mask_code[:, None] & (offs_d < width)[None, :]  # [R, BLOCK_D]
            other = tl.load(codebook_ptrs, mask=there, other=0.0).to(tl.float32)  # [R, BLOCK_D]
            # By the vector's scale: codes beyond reach have none.
            other = tl.where(there, (other - centre[None, :]) * scale[:, None], 0.0)  # [R, BLOCK_D]
            score = tl.sum(other * other, axis=1) / 2 - tl.sum(values * other, axis=1)  # [R]
            better = mask_code & (score < least)  # [R]
            least = tl.where(better, score, least)  # [R]
            found = tl.where(better, offs_code, found)  # [R]
    return found


@triton.jit
def _nearest(
    residual, ready_ptr, codes16_ptr, codebook_ptr, codebook_stride_k, wanted, width, num_blocks,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PROGRAMS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Codes [R] nearest to residuals [R, BLOCK_D] of one level, _NONE where no score is finite."""
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    facts_ptrs = ready_ptr + tl.arange(0, PROGRAMS)  # [PROGRAMS]
    code_exponent = tl.load(ready_ptr).to(tl.int32)
    code_norm = tl.max(tl.load(facts_ptrs + PROGRAMS), axis=0)
    code_residual = tl.max(tl.load(facts_ptrs + 2 * PROGRAMS), axis=0)
    far = 0.99 * tl.min(tl.load(facts_ptrs + 3 * PROGRAMS), axis=0)
    halves_ptr = ready_ptr + FACTS * PROGRAMS + BLOCK_D
    centre = tl.load(ready_ptr + FACTS * PROGRAMS + offs_d)  # [BLOCK_D]
    centred = tl.where((offs_d < width)[None, :], residual - centre[None, :], 0.0)  # [R, BLOCK_D]
    # [R], as is all that follows from them up to the loop.
    exponent = tl.minimum(scale_exponent(tl.max(tl.abs(centred), axis=1)), code_exponent - _LEAST_FACTOR)
    factor_exponent = tl.minimum(code_exponent - exponent, _LARGEST_FACTOR)
    factor, scale = power_of_two(factor_exponent), power_of_two(exponent)
    values = centred * scale[:, None]  # [R, BLOCK_D]
    half_rows = values.to(tl.float16)  # [R, BLOCK_D]
    wide = half_rows.to(tl.float32)  # [R, BLOCK_D]
    norm = tl.sqrt(tl.sum(wide * wide, axis=1))
    residual_norm = tl.sqrt(tl.sum((values - wide) * (values - wide), axis=1))
    # The bound of `fastvq.kernels.nearest_code`, and the scores' shift to 1 and more.
    shift = 1.01 * factor * norm * code_norm + 1
    error = residual_norm * code_norm + norm * (code_residual + (BLOCK_D + 1) * (2.0**-22) * code_norm)
    error = 1.01 * (factor * error + (BLOCK_D + 4) * (2.0**-25) * code_norm * code_norm)
    length = 1.01 * factor * (norm + residual_norm)
    horizon = tl.where(far > length, far * (far / 2 - length), -float("inf"))

    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    low: tl.constexpr = BLOCK_K - 1
    rows: tl.constexpr = residual.shape[0]
    least = tl.full([rows], float("inf"), tl.float32)  # [R]
    second = tl.full([rows], float("inf"), tl.float32)  # [R]
    found = tl.zeros([rows], tl.int32)  # [R]
    for block in range(num_blocks):
        # [R, BLOCK_K], no two equal in a row
        packed = _packed_scores(
            half_rows, factor, shift, halves_ptr, codes16_ptr, block * BLOCK_K + local, offs_d, BLOCK_D
        )
        if EXACT:
            left, right = tl.split(tl.reshape(packed, [rows, BLOCK_K // 2, 2]))  # [R, BLOCK_K / 2] each
            smaller, larger = tl.minimum(left, right), tl.maximum(left, right)  # [R, BLOCK_K / 2] each
            first = tl.min(smaller, axis=1)  # [R]
            after = tl.min(tl.where(smaller == first[:, None], larger, smaller), axis=1)  # [R]
            second = tl.minimum(tl.minimum(second, after), tl.maximum(first, least))  # [R]
        else:
            first = tl.min(packed, axis=1)  # [R]
        bits = first.to(tl.int32, bitcast=True)  # [R]
        first = (bits & ~low).to(tl.float32, bitcast=True)
        better = first < least  # [R]
        found = tl.where(better, block * BLOCK_K + (bits & low), found)  # [R]
        least = tl.where(better, first, least)  # [R]

    # All [R]. Not finite: no usable code, NaN, or a score that float32 cannot hold once unscaled.
    unscale = -(code_exponent + exponent + factor_exponent)
    half = unscale >> 1
    score = (least - shift) * power_of_two(half) * power_of_two(unscale - half)
    finite = (least < BEYOND / 2) & (tl.abs(score) < float("inf"))
    error += 1.01 * (BLOCK_K + 4) * (2.0**-23) * least
    # Whole numbers: where no code is beyond reach a score may be as large as it likes.
    any_beyond = tl.where(far < float("inf"), 1, 0)
    beyond = ((least - shift + error < horizon) == 0).to(tl.int32) * any_beyond > 0
    unsure = beyond
    if EXACT:
        unsure = unsure | ((second > least + 2 * error) == 0)
    unsure = unsure & finite & wanted
    if tl.max(unsure.to(tl.int32), axis=0) > 0:
        found = _rescored(
            values, half_rows, centre, factor, scale, least - shift + 2 * error, unsure, beyond, found, halves_ptr,
            codes16_ptr, codebook_ptr, codebook_stride_k, offs_d, width, num_blocks, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    return tl.where(finite, found, _NONE)


@triton.jit
def _levels_kernel(
    x_ptr, codebooks_ptr, ready_ptr, codes16_ptr, depths_ptr, found_ptr,
    x_stride_n, codebooks_stride_q, codebooks_stride_k, num_rows, width, num_levels, num_blocks, level_step,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PROGRAMS: tl.constexpr,
    EXACT: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """Codes [N, Q], _NONE where no score is finite; at levels that a vector takes no part in they stay as they are."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_n = offs_n < num_rows  # [BLOCK_N]
    mask_d = offs_d < width  # [BLOCK_D]
    x_ptrs = x_ptr + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    residual = tl.load(x_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    levels = num_levels
    depth = tl.where(mask_n, num_levels, 0)  # [BLOCK_N]
    if PARTLY:
        given = tl.load(depths_ptr + offs_n, mask=mask_n, other=0)  # [BLOCK_N]
        depth = tl.minimum(given, num_levels).to(tl.int32)
        levels = tl.max(depth, axis=0)
    for level in range(levels):
        wanted = level < depth  # [BLOCK_N]
        found = _nearest(
            residual, ready_ptr, codes16_ptr, codebooks_ptr, codebooks_stride_k, wanted, width, num_blocks,
            BLOCK_K, BLOCK_D, PROGRAMS, EXACT,
        )  # fmt: skip
        tl.store(found_ptr + offs_n * num_levels + level, found, mask=wanted)
        offs_code = tl.maximum(found, 0).to(tl.int64)  # [BLOCK_N]
        codebooks_ptrs = codebooks_ptr + offs_code[:, None] * codebooks_stride_k + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        code = tl.load(codebooks_ptrs, mask=wanted[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        residual -= code.to(tl.float32)
        codebooks_ptr += codebooks_stride_q
        ready_ptr += level_step * (FACTS * PROGRAMS + BLOCK_D + num_blocks * BLOCK_K)
        codes16_ptr += level_step * num_blocks * BLOCK_K * BLOCK_D


@triton.jit
def _follow_kernel(
    x_ptr, codebooks_ptr, found_ptr, indices_ptr, quantized_ptr, sums_ptr, counts_ptr, errors_ptr, keys_ptr,
    x_stride_n, codebooks_stride_q, codebooks_stride_k, num_rows, num_codes, width, num_levels,
    STATISTICS: tl.constexpr, ATOMIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Indices, some columns of the sum of codes, and of every level their squared error and, with ATOMIC, counts and
    sums, else the keys to sort by.

    Vectors of one code are summed here before they are added, so that a code that takes many gets few additions.
    """
    local = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + local  # [BLOCK_N]
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_n = offs_n < num_rows  # [BLOCK_N]
    mask_d = offs_d < width  # [BLOCK_D]
    x_ptrs = x_ptr + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    residual = tl.load(x_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    errors_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for level in range(num_levels):
        found = tl.load(found_ptr + offs_n * num_levels + level, mask=mask_n, other=_ABSENT)  # [BLOCK_N]
        present = found != _ABSENT  # [BLOCK_N]
        keep = found >= 0  # [BLOCK_N]
        offs_code = tl.maximum(found, 0).to(tl.int64)  # [BLOCK_N]
        if tl.program_id(1) == 0:
            indices_ptrs = indices_ptr + offs_n * num_levels + level  # [BLOCK_N]
            tl.store(indices_ptrs, tl.where(present, offs_code, _ABSENT), mask=mask_n)
        codebooks_ptrs = codebooks_ptr + offs_code[:, None] * codebooks_stride_k + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        mask = present[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]
        code = tl.load(codebooks_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        code = code.to(tl.float32)
        if STATISTICS:
            gap = tl.where(mask, residual - code, 0.0)  # [BLOCK_N, BLOCK_D]
            tl.store(errors_ptr, tl.sum(tl.sum(gap * gap, axis=1), axis=0))
            # [BLOCK_N, BLOCK_N]
            same = (found[:, None] == found[None, :]) & keep[:, None] & keep[None, :]
            leader = keep & (tl.min(tl.where(same, local[None, :], BLOCK_N), axis=1) == local)  # [BLOCK_N]
            if ATOMIC:
                if tl.program_id(1) == 0:
                    tl.atomic_add(counts_ptr + offs_code, tl.sum(same.to(tl.int64), axis=1), mask=leader, sem="relaxed")
                # Rows that are left out may hold NaN, which a product with zero would keep.
                kept = tl.where(keep[:, None], residual, 0.0)  # [BLOCK_N, BLOCK_D]
                grouped = tl.dot(same.to(tl.float32), kept, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
                sums_ptrs = sums_ptr + offs_code[:, None] * width + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
                tl.atomic_add(sums_ptrs, grouped, mask=leader[:, None] & mask_d[None, :], sem="relaxed")
            elif tl.program_id(1) == 0:
                tl.store(keys_ptr + offs_n, tl.where(keep, found, num_codes).to(tl.int32), mask=mask_n)
            errors_ptr += tl.num_programs(0) * tl.num_programs(1)
            sums_ptr += num_codes * width
            counts_ptr += num_codes
            keys_ptr += num_rows
        codebooks_ptr += codebooks_stride_q
        residual -= code
        total += code
    quantized_ptrs = quantized_ptr + offs_n[:, None] * width + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    tl.store(quantized_ptrs, total, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit
def _ordered_sums_kernel(
    x_ptr, x_stride_n, codebooks_ptr, codebooks_stride_q, codebooks_stride_k, found_ptr, order_ptr, ends_ptr,
    sums_ptr, counts_ptr, num_rows, num_codes, width, num_levels, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of one level's residuals of the vectors of one code, which lie side by side in order."""
    code = tl.program_id(0).to(tl.int64)
    level = tl.program_id(2)
    ends_ptr += level.to(tl.int64) * num_codes + code
    end = tl.load(ends_ptr)
    begin = tl.load(ends_ptr - 1, mask=code > 0, other=0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < width  # [BLOCK_D]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    for first in range(begin, end, BLOCK_N):
        offs_slot = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_slot < end  # [BLOCK_N]
        offs_n = tl.load(order_ptr + level.to(tl.int64) * num_rows + offs_slot, mask=mask_n, other=0)  # [BLOCK_N]
        mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]
        x_ptrs = x_ptr + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
        residual = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        earlier_ptr = codebooks_ptr
        for before in range(level):
            found = tl.load(found_ptr + offs_n * num_levels + before, mask=mask_n, other=0)  # [BLOCK_N]
            offs_code = tl.maximum(found, 0).to(tl.int64)  # [BLOCK_N]
            codebooks_ptrs = (
                earlier_ptr + offs_code[:, None] * codebooks_stride_k + offs_d[None, :]
            )  # [BLOCK_N, BLOCK_D]
            residual -= tl.load(codebooks_ptrs, mask=mask, other=0.0).to(tl.float32)
            earlier_ptr += codebooks_stride_q
        total += residual
    sums_ptrs = sums_ptr + (level.to(tl.int64) * num_codes + code) * width + offs_d  # [BLOCK_D]
    tl.store(sums_ptrs, tl.sum(total, axis=0), mask=mask_d)
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + level.to(tl.int64) * num_codes + code, end - begin)


@torch.no_grad()
def residual_codes(x: Tensor, codebooks: Tensor, depths: Tensor | None, *, mode: str) -> tuple[Tensor, Tensor]:
    """The sum of codes and the indices, as `fastvq.ops.residual_codes` defines them.

    Args:
        x: [N, D], float32, bfloat16 or float16; D <= 256.
        codebooks: [Q, K, D], any of these types, on the same device.
        depths: integers [N] or None.
        mode: ``exact`` or ``fast``.

    Returns:
        float32 [N, D], and int64 [N, Q], -1 at levels that a vector takes no part in.
    """
    with on_device(x.device):
        x, codebooks = _unit_stride(x), _unit_stride(codebooks)
        return _run(x, codebooks, depths, mode == "exact", None)[:2]


@torch.no_grad()
def residual_codes_statistics(
    x: Tensor, codebooks: Tensor, depths: Tensor | None, *, mode: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`residual_codes`, and what training needs of every level.

    Args:
        deterministic: the same bits in every run; no floating-point atomics. Vectors are sorted by code instead.

    Returns:
        Squared errors float32 [Q], sums float32 [Q, K, D], counts int64 [Q, K], and as `residual_codes`.
    """
    (rows, width), (levels, num_codes, _) = x.shape, codebooks.shape
    make = x.new_empty if deterministic and rows else x.new_zeros
    sums = make((levels, num_codes, width), dtype=torch.float32)
    counts = make((levels, num_codes), dtype=torch.int64)
    blocks = triton.cdiv(rows, _SUM_ROWS), triton.cdiv(width, _SUM_COLUMNS)
    errors = x.new_empty((levels, *blocks), dtype=torch.float32)
    keys = x.new_empty((levels, rows), dtype=torch.int32) if deterministic else None
    with on_device(x.device):
        x, codebooks = _unit_stride(x), _unit_stride(codebooks)
        total, indices, found = _run(x, codebooks, depths, mode == "exact", (sums, counts, errors, keys))
        if keys is not None and rows:
            ordered, order = torch.sort(keys, dim=1, stable=True)
            codes = torch.arange(num_codes, dtype=torch.int32, device=x.device).expand(levels, -1).contiguous()
            ends = torch.searchsorted(ordered, codes, right=True)
            _ordered_sums_kernel[(num_codes, blocks[1], levels)](
                x, x.stride(0), codebooks, codebooks.stride(0), codebooks.stride(1), found, order, ends, sums, counts,
                rows, num_codes, width, levels, BLOCK_N=_SUM_ROWS, BLOCK_D=_SUM_COLUMNS, num_warps=4, **FUSE,
            )  # fmt: skip
        return errors.sum((1, 2)), sums, counts, total, indices


class _Plan(NamedTuple):
    """How codes are made ready and searched for, and what follows; codebooks that are made ready."""

    prepare: Preparation
    levels: Launcher
    follow: Launcher
    distinct: int


@planned
def _plan(x: Form, codebooks: Form, depths: torch.dtype | None, exact: bool, statistics: bool, keys: bool) -> _Plan:
    (rows, width), (levels, num_codes, _) = x.shape, codebooks.shape
    if width > WIDEST:
        raise UnavailableError(f"x: expected vectors of at most {WIDEST} numbers for Triton, got {width}")
    capability, processors = hardware(x.device)
    tiles = level_tiles(width, num_codes, capability)
    padded = max(16, triton.next_power_of_2(width))
    padded_codes = triton.cdiv(num_codes, tiles.block_k) * tiles.block_k
    # One codebook that all levels share is made ready once.
    shared = levels == 1 or codebooks.strides[0] == 0
    distinct = 1 if shared else levels
    given = codebooks._replace(shape=(distinct, num_codes, width))
    vectors = x._replace(shape=(distinct, rows, width), strides=(0, *x.strides))
    prepare = preparation(given, vectors, padded_codes, padded, processors)
    strides = x.strides[0], *codebooks.strides[:2]
    options = {
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_D": padded,
        "PROGRAMS": prepare.programs,
        "EXACT": exact,
        "PARTLY": depths is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSE,
    }
    numbers = *strides, rows, width, levels, padded_codes // tiles.block_k, 0 if shared else 1
    search = Launcher(_levels_kernel, (triton.cdiv(rows, tiles.block_n),), numbers, options)
    options = {
        "STATISTICS": statistics,
        "ATOMIC": not keys,
        "BLOCK_N": _SUM_ROWS,
        "BLOCK_D": _SUM_COLUMNS,
        "num_warps": 4,
        **FUSE,
    }
    grid = triton.cdiv(rows, _SUM_ROWS), triton.cdiv(width, _SUM_COLUMNS)
    follow = Launcher(_follow_kernel, grid, (*strides, rows, num_codes, width, levels), options)
    return _Plan(prepare, search, follow, distinct)


def _run(
    x: Tensor,
    codebooks: Tensor,
    depths: Tensor | None,
    exact: bool,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of codes, the indices, and codes int32 [N, Q]: -1 where a vector takes no part, -2 where no code has a
    finite score. Fills sums, counts (or keys in their place) and errors.
    """
    (rows, width), levels = x.shape, codebooks.shape[0]
    total = x.new_empty((rows, width), dtype=torch.float32)
    indices = x.new_empty((rows, levels), dtype=torch.int64)
    found = x.new_full((rows, levels), _ABSENT.value, dtype=torch.int32)
    if total.numel() == 0:
        return total, indices.zero_(), found
    sums, counts, errors, keys = (total, indices, total, None) if statistics is None else statistics
    depths = None if depths is None else depths.contiguous()
    kind = None if depths is None else depths.dtype
    plan = _plan(form(x), form(codebooks), kind, exact, statistics is not None, keys is not None)
    ready, codes16 = plan.prepare.ready(x, plan.distinct), plan.prepare.codes16(x, plan.distinct)
    plan.prepare.launch(codebooks, x, ready, codes16, None, None, None)
    plan.levels(x, codebooks, ready, codes16, found if depths is None else depths, found)
    plan.follow(x, codebooks, found, indices, total, sums, counts, errors, found if keys is None else keys)
    return total, indices, found


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()
