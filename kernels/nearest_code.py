"""Nearest code on a GPU: tensor-core scores of half precision, and float32 where those cannot decide.

Two launches. Each head's codebook is prepared once (`prepare_codes`): centred, scaled by a power of two, and rounded to
float16, but for codes far beyond the reach of nearly all vectors. The search (`_search_kernel`) takes a block of
vectors at a time, likewise centred, scaled and rounded, and passes over the codes; column by column of the blocks of
scores it keeps the two smallest, so that rows are compared only once all codes have passed.

In ``exact`` mode a vector is decided if its two smallest scores are farther apart than the error bound below. Else the
two codes are compared in float32, if no third one can be the nearest; if one can, all codes within the bound are, in a
second pass for that block of vectors, as they are if both stand in one column. Of normal vectors and codes, D 64, 3.2 %
have two candidates and 0.17 % take a second pass at K 512, with them every fifth block; at K 8192 4.8 %, 0.24 % and
28 % of the blocks. A vector that may have a code beyond reach as its nearest takes the second pass in either mode, and
all those codes are candidates for it: a far code costs the others neither accuracy nor time.

Float16 rather than bfloat16 or TF32: Hopper multiplies float16 as fast as bfloat16 and twice as fast as TF32; it has
TF32's 11 significant bits, and scaling by powers of two, one per vector and one per codebook, makes up for its range.
So a single product leaves about as few vectors undecided as TF32 does, at half the time; three bfloat16 products would
leave none but take three times as long.

Error bound, for x and c centred and scaled, x = xh + xl and c = ch + cl with float16 xh, ch, and u = 2^-24:

    |x.c - xh.ch| <= |xl| |c| + |xh| |cl|           by Cauchy-Schwarz, with the residuals' norms as they are, which is
                                                    three times sharper than 2^-11 (|x| |c| + |x| |c|)
    |xh.ch - computed| <= 4 D u |xh| |ch|           products are exact in float32; each addition errs by at most four
                                                    units of the sum of magnitudes: tensor cores truncate terms when
                                                    aligning them, and truncate the sum
    centring: 4 u |x| |c| + (D + 4) u |c|^2 / 2     each difference is rounded once, |c|^2 / 2 is a sum of D squares
    packing the block: (2^bits + 4) 2 u score       the lowest bits of a score hold the number of its block of codes

With E their sum, |c| being the largest within reach, the nearest code's computed score is at most 2 E above the
smallest. The score of a code of at least length F, F > |x|, is at least F^2 / 2 - |x| F: a vector whose least score and
E are together below that need not look beyond reach.

Candidates are compared without centre or scale: with r the code of the smallest score, (c - r).(x - (c + r) / 2) is
half of |x - r|^2 - |x - c|^2. Every factor is rounded relative to its own size or by u (|c| + |r|) / 2, so that the
comparison errs by a few u |c - r| (|x| + |c| + |r|): the distance of the code found is within 16 u (|x| + |c|)^2 of the
least one, c being the farther of the code found and the nearest, and equal codes compare as equal.

Floors, derived from what an H200 has shown of itself (4.2 TB/s, 634 to 778 TFLOP/s of bfloat16), not measured:

    preparation     reads and writes 4 + 2 bytes an element of the codebook, and 128 KB more a program, from L2; a few
                    microseconds of latency at any size up to K 8192
    search          2 N K D operations: 6 us at N 65536, K 512, D 64, 97 us at K 8192; reads x (16.8 MB, 4 us), writes
                    8 N bytes. Comparing takes a multiply-add, an addition, a logical operation, two minima and a
                    maximum a score, the last four at half rate: 10 issue slots of 128 lanes a cycle, 11 us and 181 us
                    on 132 multiprocessors at 1.755 GHz. That is the floor of exact mode, 6 slots that of fast mode;
                    second passes add a fifth
    statistics      reads x again, from L2 (see `fastvq.kernels.code_statistics`)

This form has run in the interpreter and been compiled, not run on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.code_statistics import Totals, assignment_statistics, empty_totals
from fastvq.kernels.launch import hardware, on_device
from fastvq.kernels.scaled_codes import (
    BEYOND,
    FACTS,
    FUSE,
    exponent_of,
    power_of_two,
    prepare_codes,
    prepare_programs,
    scale_exponent,
)
from fastvq.kernels.tuning import tuned

__all__ = ["nearest_code", "nearest_code_statistics"]

# A row's scale exceeds the codes' by at most 2^20, so that products of tiny rows do not underflow in a score; products
# count at most 2^60 times in a score, where half norms are already far below their rounding.
_LEAST_FACTOR: tl.constexpr = tl.constexpr(-20)
_LARGEST_FACTOR: tl.constexpr = tl.constexpr(60)
# Columns of vectors that candidates are compared by at a time.
_COMPARED = 16
# Blocks of codes that a score's lowest bits tell apart: more cost accuracy, fewer have rows compared more often.
_MOST_BITS = 8

# Wider vectors would not leave room on chip.
_LARGEST_WIDTH = 512


class Tiles(NamedTuple):
    """Of the search: vectors, codes and depth at a time; warps, pipeline stages, and programs per multiprocessor."""

    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int
    programs: int

    @property
    def registers(self) -> int | None:
        """What a thread may have if so many programs are to share a multiprocessor; None where that is no limit."""
        share = (1 << 16) // (32 * self.warps * self.programs) // 8 * 8
        return share if share < 255 else None


# Worth trying; `search_tiles` chooses.
CANDIDATES = (
    Tiles(128, 32, 32, 8, 3, 2),
    Tiles(64, 32, 32, 4, 3, 3),
    Tiles(128, 64, 64, 8, 2, 1),
    Tiles(64, 32, 64, 8, 2, 1),
    Tiles(64, 32, 64, 4, 2, 2),
    Tiles(64, 32, 64, 4, 2, 1),
)


def search_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_search_kernel` for vectors of ``width`` and a compute ``capability`` such as 90.

    On Hopper 128 vectors, since with fewer the codes would have to come from L2 faster than it gives them. 32 codes,
    since the two smallest scores of every column stay in registers, and two programs of 8 warps and 128 registers then
    fit on a multiprocessor and one multiplies while the other compares. A depth of 32, since threads that load such
    rows share fewer of them, and what is known of a row takes registers in each. Elsewhere that spills, and blocks are
    smaller, as they are for wide vectors.

    Codes pass by for every block of vectors, though 1024 of them might stay in shared memory: 64 KB for 128 vectors at
    K 512, D 64 are a fifth of what L2 gives a multiprocessor in that time, while a loop over codes that stay has to be
    unrolled for Triton, and then spills 800 bytes a thread.
    """
    hopper = 90 <= capability < 100
    if width <= 128:
        fitting = CANDIDATES[0:2] if hopper else CANDIDATES[1:2]
    elif hopper:
        fitting = CANDIDATES[2:5] if width <= 256 else CANDIDATES[3:4]
    else:
        fitting = CANDIDATES[4:6] if width <= 256 else CANDIDATES[5:6]
    sizes = f"d{triton.next_power_of_2(width)} k{triton.next_power_of_2(num_codes)}"
    tiles = tuned("nearest_code", capability, sizes, fitting) or fitting[0]
    block_k = min(tiles.block_k, max(16, triton.next_power_of_2(num_codes)))
    return tiles._replace(block_k=block_k, block_d=min(tiles.block_d, max(16, triton.next_power_of_2(width))))


@triton.jit
def _row_exponent(
    x_ptr, offs_x, mask_n, mean_ptr, code_exponent, width, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Exponent [R] of each row's scale, and [R] of the factor of its products in a score; rows at offs_x [R]."""
    local = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    top = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    for chunk in range(CHUNKS):
        offs_d = chunk * BLOCK_D + local  # [BLOCK_D]
        mask = mask_n[:, None] & (offs_d < width)[None, :]  # [R, BLOCK_D]
        x_ptrs = x_ptr + offs_x[:, None] + offs_d[None, :]  # [R, BLOCK_D]
        values = tl.load(x_ptrs, mask=mask, other=0.0)  # [R, BLOCK_D]
        # [R, BLOCK_D]
        centred = tl.where((offs_d < width)[None, :], values.to(tl.float32) - tl.load(mean_ptr + offs_d)[None, :], 0.0)
        top = tl.maximum(top, tl.max(tl.abs(centred), axis=1))  # [R]
    exponent = tl.minimum(scale_exponent(top), code_exponent - _LEAST_FACTOR)  # [R]
    return exponent, tl.minimum(code_exponent - exponent, _LARGEST_FACTOR)


@triton.jit
def _half_rows(x_ptr, offs_x, mask_n, mean_ptr, scale, width, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows centred, scaled and rounded to float16, CHUNKS x [R, BLOCK_D]; the norms [R] of them and of their
    residuals.
    """
    local = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    squares = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    residual_squares = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        offs_d = chunk * BLOCK_D + local  # [BLOCK_D]
        mask = mask_n[:, None] & (offs_d < width)[None, :]  # [R, BLOCK_D]
        x_ptrs = x_ptr + offs_x[:, None] + offs_d[None, :]  # [R, BLOCK_D]
        values = tl.load(x_ptrs, mask=mask, other=0.0)  # [R, BLOCK_D]
        centred = values.to(tl.float32) - tl.load(mean_ptr + offs_d)[None, :]  # [R, BLOCK_D]
        values = tl.where((offs_d < width)[None, :], centred, 0.0) * scale[:, None]  # [R, BLOCK_D]
        rounded = values.to(tl.float16)  # [R, BLOCK_D]
        wide = rounded.to(tl.float32)  # [R, BLOCK_D]
        squares += tl.sum(wide * wide, axis=1)  # [R]
        residual_squares += tl.sum((values - wide) * (values - wide), axis=1)  # [R]
        chunks = chunks + (rounded,)  # noqa: RUF005
    return chunks, tl.sqrt(squares), tl.sqrt(residual_squares)


@triton.jit
def _products(chunks, codes16_ptr, offs_k, padded, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Products [R, BLOCK_K] of the rows, CHUNKS x [R, BLOCK_D], with codes offs_k [BLOCK_K]."""
    local = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    acc = tl.zeros([chunks[0].shape[0], offs_k.shape[0]], tl.float32)  # [R, BLOCK_K]
    for chunk in tl.static_range(CHUNKS):
        codes_ptrs = codes16_ptr + offs_k[:, None] * padded + (chunk * BLOCK_D + local)[None, :]  # [BLOCK_K, BLOCK_D]
        codes = tl.load(codes_ptrs)  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(chunks[chunk], tl.trans(codes), acc)  # [R, BLOCK_K]
    return acc


@triton.jit
def _take(first, second, acc, half, factor, shift, number, BITS: tl.constexpr, EXACT: tl.constexpr):
    """The smallest, and second smallest, scores [R, BLOCK_K] of each row and column, after those of one more block.

    Scores are at least 1, so that their order is that of their bits, the lowest of which hold the block's ``number``.
    """
    # In this order everything is in the layout of acc, and the first two operations are one.
    scores = half[None, :] - acc * factor[:, None] + shift[:, None]  # [R, BLOCK_K]
    packed = ((scores.to(tl.int32, bitcast=True) >> BITS) << BITS) | number  # [R, BLOCK_K]
    packed = packed.to(tl.float32, bitcast=True)  # [R, BLOCK_K]
    if EXACT:
        second = tl.minimum(second, tl.maximum(first, packed))  # [R, BLOCK_K]
    return tl.minimum(first, packed), second


@triton.jit
def _least(scores, first_block, BITS: tl.constexpr):
    """The smallest of packed scores [R, BLOCK_K] of a row without its block's number, its column and its code, [R]."""
    local = tl.arange(0, scores.shape[1])[None, :]  # [1, BLOCK_K]
    packed = tl.min(scores, axis=1)  # [R]
    # The first among equals.
    column = tl.min(tl.where(scores == packed[:, None], local, scores.shape[1] - 1), axis=1)  # [R]
    bits = packed.to(tl.int32, bitcast=True)  # [R]
    least = (bits >> BITS) << BITS  # [R]
    return least.to(tl.float32, bitcast=True), column, (first_block + (bits - least)) * scores.shape[1] + column


@triton.jit
def _gain(
    x_ptr, offs_x, codebook_ptr, codebook_stride_k, reference, has_reference, other, mask, scale, width,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """(|x - r|^2 - |x - c|^2) / 2 [R], scaled, r being code ``reference`` (or zero) and c ``other``, where ``mask``."""
    found = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    for start in range(0, width, COMPARED):
        offs_d = start + tl.arange(0, COMPARED)  # [COMPARED]
        there = mask[:, None] & (offs_d < width)[None, :]  # [R, COMPARED]
        x_ptrs = x_ptr + offs_x[:, None] + offs_d[None, :]  # [R, COMPARED]
        r_ptrs = codebook_ptr + reference.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]  # [R, COMPARED]
        c_ptrs = codebook_ptr + other.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]  # [R, COMPARED]
        x = tl.load(x_ptrs, mask=there, other=0.0).to(tl.float32)  # [R, COMPARED]
        r = tl.load(r_ptrs, mask=there & has_reference[:, None], other=0.0).to(tl.float32)  # [R, COMPARED]
        c = tl.load(c_ptrs, mask=there, other=0.0).to(tl.float32)  # [R, COMPARED]
        found += tl.sum((c - r) * ((x - (c / 2 + r / 2)) * scale[:, None]), axis=1)  # [R]
    return found


@triton.jit
def _search_kernel(
    x_ptr, x_stride_h, x_stride_n, codebook_ptr, codebook_stride_h, codebook_stride_k, ready_ptr, codes16_ptr,
    indices_ptr, undecided_ptr, num_rows, width, padded, num_blocks, none,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, PROGRAMS: tl.constexpr, EXACT: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code of each vector, ``none`` where no code has a finite score.

    PROGRAMS is how many prepared the codes; their blocks come in GROUPS of 2^BITS.
    """
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * x_stride_h
    codebook_ptr += head * codebook_stride_h
    indices_ptr += head * num_rows
    codes16_ptr += head * num_blocks * BLOCK_K * padded
    ready_ptr += head * (FACTS * PROGRAMS + padded + num_blocks * BLOCK_K)
    mean_ptr = ready_ptr + FACTS * PROGRAMS
    halves_ptr = mean_ptr + padded
    facts_ptrs = ready_ptr + tl.arange(0, PROGRAMS)  # [PROGRAMS]
    code_exponent = tl.load(ready_ptr).to(tl.int32)
    code_norm = tl.max(tl.load(facts_ptrs + PROGRAMS), axis=0)
    code_residual = tl.max(tl.load(facts_ptrs + 2 * PROGRAMS), axis=0)
    far = 0.99 * tl.min(tl.load(facts_ptrs + 3 * PROGRAMS), axis=0)
    any_beyond = tl.where(far < float("inf"), 1, 0)
    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    group: tl.constexpr = 1 << BITS

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.num_programs(0)):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
        mask_n = offs_n < num_rows  # [BLOCK_N]
        offs_x = offs_n * x_stride_n  # [BLOCK_N]
        # [BLOCK_N], as is all that follows from them up to the loop.
        exponent, factor_exponent = _row_exponent(
            x_ptr, offs_x, mask_n, mean_ptr, code_exponent, width, BLOCK_D, CHUNKS
        )
        factor = power_of_two(factor_exponent)
        scale = power_of_two(exponent)
        # CHUNKS x [BLOCK_N, BLOCK_D], [BLOCK_N], [BLOCK_N]
        chunks, norm, residual_norm = _half_rows(x_ptr, offs_x, mask_n, mean_ptr, scale, width, BLOCK_D, CHUNKS)
        # 1.01 covers the rounding of norms and products.
        shift = 1.01 * factor * norm * code_norm + 1
        # Few numbers for each vector, since they stay in registers while codes pass by.
        error = residual_norm * code_norm + norm * (code_residual + (padded + 1) * (2.0**-22) * code_norm)
        error = 1.01 * (factor * error + (padded + 4) * (2.0**-25) * code_norm * code_norm)
        # Below it no score is that of a code beyond reach. 1.01 and 0.99 cover the rounding of lengths.
        length = 1.01 * factor * (norm + residual_norm)
        horizon = tl.where(far > length, far * (far / 2 - length), -float("inf"))

        least = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N]
        second = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N]
        third = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N], no more than the third smallest
        found = tl.zeros([BLOCK_N], tl.int32)  # [BLOCK_N]
        rival = tl.zeros([BLOCK_N], tl.int32)  # [BLOCK_N]
        for step in range(GROUPS):
            first_block = step * group
            columns = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)  # [BLOCK_N, BLOCK_K]
            others = tl.full([BLOCK_N, BLOCK_K], float("inf"), tl.float32)  # [BLOCK_N, BLOCK_K]
            for block in range(first_block, tl.minimum(first_block + group, num_blocks)):
                offs_k = block * BLOCK_K + local  # [BLOCK_K]
                acc = _products(chunks, codes16_ptr, offs_k, padded, BLOCK_D, CHUNKS)  # [BLOCK_N, BLOCK_K]
                half = tl.load(halves_ptr + offs_k)  # [BLOCK_K]
                number = block - first_block
                columns, others = _take(columns, others, acc, half, factor, shift, number, BITS, EXACT)
            # [BLOCK_N] each. What is left of a column is no less than its second smallest.
            a, column, code = _least(columns, first_block, BITS)
            better = a < least
            if EXACT:
                left = tl.where(column[:, None] == local[None, :], others, columns)  # [BLOCK_N, BLOCK_K]
                b, column, code_b = _least(left, first_block, BITS)
                left = tl.where(column[:, None] == local[None, :], others, left)  # [BLOCK_N, BLOCK_K]
                c, column, _ = _least(left, first_block, BITS)
                # Both lists are sorted: the loser's head stands against the winner's second.
                head_of_loser = tl.where(better, least, a)
                code_of_loser = tl.where(better, found, code)
                next_of_winner = tl.where(better, b, second)
                code_of_next = tl.where(better, code_b, rival)
                nearer = next_of_winner < head_of_loser
                third = tl.where(
                    nearer,
                    tl.minimum(tl.where(better, c, third), head_of_loser),
                    tl.minimum(next_of_winner, tl.where(better, second, b)),
                )
                second = tl.where(nearer, next_of_winner, head_of_loser)
                rival = tl.where(nearer, code_of_next, code_of_loser)
            found = tl.where(better, code, found)
            least = tl.where(better, a, least)

        # Not finite: no code within reach, NaN, or a score that float32 cannot hold once unscaled, in two steps to stay
        # in range. All blocks are [BLOCK_N] from here on.
        unscale = -(code_exponent + exponent_of(scale) + exponent_of(factor))
        part = unscale >> 1
        score = (least - shift) * power_of_two(part) * power_of_two(unscale - part)
        finite = (least < BEYOND / 2) & (tl.abs(score) < float("inf"))
        error += 1.01 * (group + 4) * (2.0**-23) * least
        # Whole numbers, since there may be no code beyond reach however large a score is.
        beyond = mask_n & (((least - shift + error < horizon) == 0).to(tl.int32) * any_beyond > 0)
        crowded = beyond
        if EXACT:
            pair = mask_n & finite & ((second > least + 2 * error) == 0)
            crowded = crowded | (pair & ((third > least + 2 * error) == 0))
            pair = pair & (crowded == 0)
            if tl.max(pair.to(tl.int32), axis=0) > 0:
                gain = _gain(
                    x_ptr, offs_x, codebook_ptr, codebook_stride_k, found, finite, rival, pair, scale, width, COMPARED
                )
                swap = pair & ((gain > 0) | ((gain == 0) & (rival < found)))
                found = tl.where(swap, rival, found)
            if undecided_ptr is not None:
                tl.atomic_add(undecided_ptr, tl.sum(pair.to(tl.int32), axis=0))
        if undecided_ptr is not None:
            tl.atomic_add(undecided_ptr + 1, tl.sum(crowded.to(tl.int32), axis=0))
        result = tl.where(finite, found, none)
        if tl.max(crowded.to(tl.int32), axis=0) > 0:
            limit = tl.where(crowded & finite, least - shift + 2 * error, -float("inf"))
            best = tl.full([BLOCK_N], -float("inf"), tl.float32)
            for again in range(num_blocks):
                offs_k = again * BLOCK_K + local  # [BLOCK_K]
                acc = _products(chunks, codes16_ptr, offs_k, padded, BLOCK_D, CHUNKS)  # [BLOCK_N, BLOCK_K]
                half = tl.load(halves_ptr + offs_k)  # [BLOCK_K]
                scores = half[None, :] - acc * factor[:, None]  # [BLOCK_N, BLOCK_K]
                # [BLOCK_N, BLOCK_K] each.
                candidate = (scores <= limit[:, None]) | (beyond[:, None] & (half == BEYOND)[None, :])
                left = tl.where(candidate, local[None, :], BLOCK_K)
                rounds = tl.max(tl.sum(candidate.to(tl.int32), axis=1), axis=0)
                for _round in range(rounds):
                    column = tl.min(left, axis=1)
                    left = tl.where(left == column[:, None], BLOCK_K, left)  # [BLOCK_N, BLOCK_K]
                    mask = column < BLOCK_K
                    code = again * BLOCK_K + tl.where(mask, column, 0)
                    gain = _gain(
                        x_ptr, offs_x, codebook_ptr, codebook_stride_k, found, finite, code, mask, scale, width,
                        COMPARED,
                    )  # fmt: skip
                    better = mask & (gain > best)
                    best = tl.where(better, gain, best)
                    result = tl.where(better, code, result)
        tl.store(indices_ptr + offs_n, result.to(tl.int64), mask=mask_n)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, mode: str, undecided: Tensor | None = None) -> Tensor:
    """Index of the nearest code, as `fastvq.ops.nearest_code` defines it.

    Args:
        x: [H, N, D], float32, bfloat16 or float16, any strides; D <= 512.
        codebook: [H, K, D], any of these types, on the same device.
        mode: ``exact``, or ``fast``: no codes are compared again in float32 but those beyond reach. The squared
            distance of the code found exceeds the least by at most 4 E of the module's bound, which is below
            2^-7 |x| max|c| + 2^-14 max|c|^2 for x and c as centred and codes within reach: up to 8 to 16 times as long
            as nearly all vectors or the shortest code.
        undecided: int32 [2], to which is added how many vectors had a pair of codes compared, and how many took a
            second pass.

    Returns:
        int64 [H, N]; 0 where no code has a finite score.
    """
    x, codebook = _unit_stride(x), _unit_stride(codebook)
    indices = x.new_empty(x.shape[:2], dtype=torch.int64)
    if not x.numel():
        return indices.zero_()
    with on_device(x.device):
        _search(x, codebook, indices, mode == "exact", 0, None, undecided)
    return indices


@torch.no_grad()
def nearest_code_statistics(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, mode: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nearest_code`, and what training needs of the assignment.

    Args:
        x, codebook, mode: as for `nearest_code`.
        mask: bool [H, N] or None; vectors where it is False are left out of all but the indices.
        deterministic: the same bits in every run; no floating-point atomics.

    Returns:
        Squared error float32 [H], sums float32 [H, K, D], counts int64 [H, K], indices int64 [H, N].
    """
    x, codebook = _unit_stride(x), _unit_stride(codebook)
    indices = x.new_empty(x.shape[:2], dtype=torch.int64)
    totals = empty_totals(codebook)
    if not x.numel():
        for total in (indices, *totals):
            total.zero_()
    with on_device(x.device):
        if x.numel():
            _search(x, codebook, indices, mode == "exact", -1, totals)
        error = assignment_statistics(x, codebook, indices, mask, totals, deterministic)
    return error, totals.sums, totals.counts, indices


class _Plan(NamedTuple):
    """What a search needs to know of its shapes alone: of the codes made ready, of the launch, and its options."""

    padded_codes: int
    padded: int
    ready_size: int
    grid: tuple[int, int]
    options: dict[str, int | bool]


@functools.lru_cache(maxsize=256)
def _plan(heads: int, num_rows: int, num_codes: int, width: int, exact: bool, tiles: Tiles, processors: int) -> _Plan:
    if width > _LARGEST_WIDTH:
        raise UnavailableError(f"x: expected vectors of at most {_LARGEST_WIDTH} numbers for Triton, got {width}")
    chunks, blocks = triton.cdiv(width, tiles.block_d), triton.cdiv(num_codes, tiles.block_k)
    padded, padded_codes = chunks * tiles.block_d, blocks * tiles.block_k
    bits = min(_MOST_BITS, (blocks - 1).bit_length())
    prepared = prepare_programs(padded_codes, processors)
    options = {
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_D": tiles.block_d,
        "CHUNKS": chunks,
        "BITS": bits,
        "GROUPS": triton.cdiv(blocks, 1 << bits),
        "PROGRAMS": prepared,
        "EXACT": exact,
        "COMPARED": _COMPARED,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSE,
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    grid = min(triton.cdiv(num_rows, tiles.block_n), tiles.programs * processors), heads
    return _Plan(padded_codes, padded, FACTS.value * prepared + padded + padded_codes, grid, options)


def _search(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    exact: bool,
    none: int,
    totals: Totals | None,
    undecided: Tensor | None = None,
) -> None:
    """Fills indices [H, N], and makes totals ready to be added to."""
    heads, num_rows, width = x.shape
    capability, processors = hardware(x.device)
    num_codes = codebook.shape[1]
    tiles = search_tiles(width, num_codes, capability)
    plan = _plan(heads, num_rows, num_codes, width, exact, tiles, processors)
    ready = x.new_empty((heads, plan.ready_size), dtype=torch.float32)
    codes16 = x.new_empty((heads, plan.padded_codes, plan.padded), dtype=torch.float16)
    prepare_codes(codebook, x, ready, codes16, totals, plan.options["PROGRAMS"])
    _search_kernel[plan.grid](
        x, x.stride(0), x.stride(1), codebook, codebook.stride(0), codebook.stride(1), ready, codes16, indices,
        undecided, num_rows, width, plan.padded, plan.padded_codes // plan.options["BLOCK_K"], none, **plan.options,
    )  # fmt: skip


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()
