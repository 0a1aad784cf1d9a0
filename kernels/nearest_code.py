"""Nearest code on a GPU: tensor-core scores of half precision, and float32 where those cannot decide.

Three launches. Each head's codebook is prepared once (`preparation`): centred, scaled by a power of two, and rounded to
float16, but for codes far beyond the reach of nearly all vectors. The search (`_search_kernel`) takes a block of
vectors at a time, likewise centred, scaled and rounded, and passes over the codes. It keeps the least score of every
group of 4 codes that lie in one column of the blocks of scores, and of every column of groups the two smallest, so that
rows are compared only once all codes have passed. The codes of the group that looks nearest are compared in float32.

In ``exact`` mode that settles a vector if no other group is within the error bound below. If one is, its codes are
compared too. If more may be, in one column or in three, the vector is crowded: it goes to a list, with the columns that
may have its code, and a third kernel compares it with all codes of these. Of normal vectors and codes, D 64, 3.2 % have
two groups and some 0.3 % are crowded at K 512, 4.8 % and 0.4 % at K 8192. A vector that may have a code beyond reach as
its nearest is crowded in either mode, with all columns: a far code costs the others neither accuracy nor time.

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

In float32 a code's score is the sum of c (c / 2 - x), centred and scaled by the vector's power of two: its error is a
few u |c| (|x| + |c|), so that the distance of the code found is within 16 u (|x| + |c|)^2 of the least one, c being the
farther of the code found and the nearest, and equal codes have equal scores.

An H200 (4.2 TB/s, 781 TFLOP/s of bfloat16) took 1.08 ms for the search of N 65536, K 8192, D 64 when each code had its
own column, and vectors without decision a second pass with their whole block; in this form it takes 0.25 ms, and 60 us
at K 512, most of which prepares rows and compares candidates. Floors, derived and not measured:

    preparation     reads and writes 4 + 2 bytes an element of the codebook, and 128 KB more a program, from L2; takes
                    21 to 25 us at any size up to K 8192, some 20000 cycles of which issue the program's instructions
    search          2 N K D operations: 6 us at N 65536, K 512, D 64, 88 us at K 8192; reads x (16.8 MB, 4 us), writes
                    8 N bytes. A score takes a multiply-add and three quarters of a minimum, a group an addition, a
                    logical operation, two minima and a maximum, the last four at half rate: 3.5 cycles of the
                    multiprocessor's slower unit a score of 128 lanes, 63 us at K 8192. What is compiled for Hopper
                    issues 5.9 instructions a score, 107 us
    statistics      reads x again, from L2 (see `fastvq.kernels.code_statistics`)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.code_statistics import assignment_statistics
from fastvq.kernels.launch import Form, Launcher, form, hardware, on_device
from fastvq.kernels.scaled_codes import (
    BEYOND,
    FACTS,
    FUSE,
    HEADER,
    UNUSABLE,
    Preparation,
    exponent_of,
    power_of_two,
    preparation,
    scale_exponent,
)
from fastvq.kernels.tuning import planned, tuned

__all__ = ["nearest_code", "nearest_code_statistics"]

# A row's scale exceeds the codes' by at most 2^20, so that products of tiny rows do not underflow in a score; products
# count at most 2^60 times in a score, where half norms are already far below their rounding.
_LEAST_FACTOR: tl.constexpr = tl.constexpr(-20)
_LARGEST_FACTOR: tl.constexpr = tl.constexpr(60)
# Columns of vectors that candidates are compared by at a time: where registers are short, and elsewhere.
_COMPARED_IF_SHORT, _COMPARED = 16, 32
# Elements of codes that a crowded vector is compared with at a time, at most.
_TAKEN_ELEMENTS, _TAKEN_WARPS = 8192, 16

# Wider vectors would not leave room on chip.
_LARGEST_WIDTH = 512


class Tiles(NamedTuple):
    """Of the search: vectors, codes and depth at a time; codes in a group; warps, pipeline stages, and programs per
    multiprocessor.
    """

    block_n: int
    block_k: int
    block_d: int
    group: int
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
    Tiles(128, 64, 32, 4, 8, 3, 2),
    Tiles(128, 64, 32, 8, 8, 3, 2),
    Tiles(128, 128, 32, 4, 8, 3, 1),
    Tiles(256, 64, 32, 4, 8, 3, 1),
    Tiles(64, 32, 32, 4, 4, 3, 3),
    Tiles(128, 64, 64, 4, 8, 2, 1),
    Tiles(64, 32, 64, 4, 8, 2, 1),
    Tiles(64, 32, 32, 4, 4, 2, 2),
    Tiles(64, 32, 64, 4, 4, 2, 1),
)


def search_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_search_kernel` for vectors of ``width`` and a compute ``capability`` such as 90.

    On Hopper 128 vectors, since with fewer the codes would have to come from L2 faster than it gives them. 64 codes,
    since two programs of 8 warps and 128 registers then fit on a multiprocessor and one multiplies while the other
    compares; fewer codes share a loop's instructions less. A depth of 32, since threads that load such rows share fewer
    of them, and what is known of a row takes registers in each. Elsewhere that spills, and blocks are smaller, as they
    are for wide vectors. Groups of 4, since the codes of the nearest group are compared again.

    Codes pass by for every block of vectors, though 1024 of them might stay in shared memory: 64 KB for 128 vectors at
    K 512, D 64 are a fifth of what L2 gives a multiprocessor in that time, while a loop over codes that stay has to be
    unrolled for Triton, and then spills 800 bytes a thread.
    """
    hopper = 90 <= capability < 100
    if width <= 128:
        fitting = CANDIDATES[0:5] if hopper else CANDIDATES[4:5]
    elif hopper:
        fitting = CANDIDATES[5:8] if width <= 256 else CANDIDATES[6:7]
    else:
        fitting = CANDIDATES[7:9] if width <= 256 else CANDIDATES[8:9]
    sizes = f"d{triton.next_power_of_2(width)} k{triton.next_power_of_2(num_codes)}"
    tiles = tuned("nearest_code", capability, sizes, fitting) or fitting[0]
    block_k = min(tiles.block_k, max(16, triton.next_power_of_2(num_codes)))
    block_d = min(tiles.block_d, max(16, triton.next_power_of_2(width)))
    return tiles._replace(block_k=block_k, block_d=block_d, group=min(tiles.group, block_k // 8))


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
def _centred(values_ptr, offs, mean_ptr, mask, start, width, COMPARED: tl.constexpr):
    """Columns of rows at offs [R], zeros but where ``mask`` [R], less the centre: [R, COMPARED]; 0 beyond the width."""
    offs_d = start + tl.arange(0, COMPARED)  # [COMPARED]
    mask_d = offs_d < width  # [COMPARED]
    values = tl.load(values_ptr + offs[:, None] + offs_d[None, :], mask=mask[:, None] & mask_d[None, :], other=0.0)
    return values.to(tl.float32) - tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)[None, :]  # [R, COMPARED]


@triton.jit
def _exact_score(
    x_ptr, offs_x, codebook_ptr, codebook_stride_k, mean_ptr, code, mask, scale, width, COMPARED: tl.constexpr
):  # fmt: skip
    """|c|^2 / 2 - x.c [R] in float32, centred and scaled, of rows at offs_x with codes [R], where ``mask``."""
    offs_c = code.to(tl.int64) * codebook_stride_k  # [R]
    found = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    for start in range(0, width, COMPARED):
        x = _centred(x_ptr, offs_x, mean_ptr, mask, start, width, COMPARED)  # [R, COMPARED]
        c = _centred(codebook_ptr, offs_c, mean_ptr, mask, start, width, COMPARED)  # [R, COMPARED]
        found += tl.sum(c * ((c / 2 - x) * scale[:, None]), axis=1)  # [R]
    return found


@triton.jit
def _take(
    first, second, acc, half, factor, shift, number, BITS: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The smallest, and second smallest, scores [R, BLOCK_K / GROUP] of each row and column of groups, after those of
    one more block.

    The codes of a group are 8 columns apart: on Ampere and Hopper one thread has their scores. A group's score is that
    of its nearest code, and at least 1, so that the order of scores is that of their bits, the lowest of which hold the
    block's ``number``.
    """
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1] // GROUP
    # In this order everything is in the layout of acc, and the two operations are one.
    scores = half[None, :] - acc * factor[:, None]  # [R, BLOCK_K]
    groups = tl.min(tl.reshape(scores, [rows, columns // 8, GROUP, 8]), axis=2)  # [R, BLOCK_K / GROUP / 8, 8]
    groups = tl.reshape(groups, [rows, columns]) + shift[:, None]  # [R, BLOCK_K / GROUP]
    packed = ((groups.to(tl.int32, bitcast=True) >> BITS) << BITS) | number  # [R, BLOCK_K / GROUP]
    packed = packed.to(tl.float32, bitcast=True)  # [R, BLOCK_K / GROUP]
    if EXACT:
        second = tl.minimum(second, tl.maximum(first, packed))  # [R, BLOCK_K / GROUP]
    return tl.minimum(first, packed), second


@triton.jit
def _unnumbered(packed, BITS: tl.constexpr):
    """Scores without the number of their block."""
    return ((packed.to(tl.int32, bitcast=True) >> BITS) << BITS).to(tl.float32, bitcast=True)


@triton.jit
def _least(scores, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The smallest of packed scores [R, C] of a row without its block's number, its column and its group's first code,
    [R].
    """
    columns: tl.constexpr = scores.shape[1]
    local = tl.arange(0, columns)[None, :]  # [1, C]
    packed = tl.min(scores, axis=1)  # [R]
    # The first among equals.
    column = tl.min(tl.where(scores == packed[:, None], local, columns - 1), axis=1)  # [R]
    block = packed.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)  # [R]
    return _unnumbered(packed, BITS), column, block * columns * GROUP + _first_of(column, GROUP)


@triton.jit
def _first_of(column, GROUP: tl.constexpr):
    """Of a column of groups, the first code in each block."""
    return column // 8 * 8 * GROUP + column % 8


@triton.jit
def _search_kernel(
    x_ptr, codebook_ptr, ready_ptr, codes16_ptr, indices_ptr, crowded_ptr, undecided_ptr,
    x_stride_h, x_stride_n, codebook_stride_h, codebook_stride_k, num_rows, width, padded, num_blocks, none,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, PROGRAMS: tl.constexpr, EXACT: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code of each vector, ``none`` where no code has a finite score; vectors that this cannot
    settle have ``none`` too, and are appended to ``crowded``, with the columns of groups that may have their code.

    PROGRAMS is how many prepared the codes, BITS those that tell their blocks apart.
    """
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * x_stride_h
    codebook_ptr += head * codebook_stride_h
    indices_ptr += head * num_rows
    crowded_ptr += head * (2 * num_rows + HEADER)
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
    groups: tl.constexpr = BLOCK_K // GROUP
    local_group = tl.arange(0, groups)[None, :]  # [1, BLOCK_K / GROUP]

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

        columns = tl.full([BLOCK_N, groups], float("inf"), tl.float32)  # [BLOCK_N, BLOCK_K / GROUP]
        others = tl.full([BLOCK_N, groups], float("inf"), tl.float32)  # [BLOCK_N, BLOCK_K / GROUP]
        for block in range(num_blocks):
            # Scalars first: then one address and constants do for all of a thread's elements.
            block_ptr = codes16_ptr + block * BLOCK_K * padded
            acc = _products(chunks, block_ptr, local, padded, BLOCK_D, CHUNKS)  # [BLOCK_N, BLOCK_K]
            half = tl.load(halves_ptr + block * BLOCK_K + local)  # [BLOCK_K]
            columns, others = _take(columns, others, acc, half, factor, shift, block, BITS, GROUP, EXACT)
        # All are [BLOCK_N] from here on.
        least, column, group = _least(columns, BITS, GROUP)
        # Not finite: no code within reach, NaN, or a score that float32 cannot hold once unscaled, in two steps to stay
        # in range.
        unscale = -(code_exponent + exponent_of(scale) + exponent_of(factor))
        part = unscale >> 1
        score = (least - shift) * power_of_two(part) * power_of_two(unscale - part)
        finite = (least < BEYOND / 2) & (tl.abs(score) < float("inf"))
        error += 1.01 * ((1 << BITS) + 4) * (2.0**-23) * least
        # Whole numbers, since there may be no code beyond reach however large a score is.
        crowded = mask_n & (((least - shift + error < horizon) == 0).to(tl.int32) * any_beyond > 0)
        # Columns that may have the nearest code, a bit for each.
        wanted = tl.where(crowded, -1, 0)
        pair = crowded & (mask_n == 0)
        rival = group
        if EXACT:
            limit = least + 2 * error
            near = (_unnumbered(columns, BITS) > limit[:, None]) == 0  # [BLOCK_N, BLOCK_K / GROUP]
            wanted = wanted | tl.sum(tl.where(near, 1 << local_group, 0), axis=1)
            # Of a column with two there may be more.
            several = tl.max(((_unnumbered(others, BITS) > limit[:, None]) == 0).to(tl.int32), axis=1) > 0
            several = several | (tl.sum(near.to(tl.int32), axis=1) > 2)
            crowded = crowded | (mask_n & finite & several)
            left = tl.where(column[:, None] == local_group, float("inf"), columns)  # [BLOCK_N, BLOCK_K / GROUP]
            second, _, rival = _least(left, BITS, GROUP)
            pair = mask_n & finite & (crowded == 0) & ((second > limit) == 0)
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        result = tl.zeros([BLOCK_N], tl.int32) + none
        for candidate in range(2 if EXACT else 1):
            first = tl.where(candidate == 0, group, rival)
            compared = tl.where(candidate == 0, mask_n & finite & (crowded == 0), pair)
            for member in range(GROUP):
                code = first + member * 8
                there = compared & (tl.load(halves_ptr + code, mask=compared, other=BEYOND) < BEYOND / 2)
                score = _exact_score(
                    x_ptr, offs_x, codebook_ptr, codebook_stride_k, mean_ptr, code, there, scale, width, COMPARED
                )
                better = there & ((score < best) | ((score == best) & (code < result)))
                best = tl.where(better, score, best)
                result = tl.where(better, code, result)
        if undecided_ptr is not None:
            tl.atomic_add(undecided_ptr, tl.sum(pair.to(tl.int32), axis=0))
            tl.atomic_add(undecided_ptr + 1, tl.sum(crowded.to(tl.int32), axis=0))
        tl.store(indices_ptr + offs_n, result.to(tl.int64), mask=mask_n)
        place = tl.atomic_add(crowded_ptr + tl.zeros([BLOCK_N], tl.int32), 1, mask=crowded, sem="relaxed")
        tl.store(crowded_ptr + HEADER + 2 * place, offs_n.to(tl.int32), mask=crowded)
        tl.store(crowded_ptr + HEADER + 2 * place + 1, wanted, mask=crowded)


@triton.jit
def _crowded_kernel(
    x_ptr, codebook_ptr, ready_ptr, crowded_ptr, indices_ptr,
    x_stride_h, x_stride_n, codebook_stride_h, codebook_stride_k, num_rows, num_codes, width, padded, num_blocks,
    PROGRAMS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TAKEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compares crowded vectors, one at a time, with all codes of their columns in float32, TAKEN at a time; where none
    has a finite score their index stays.
    """
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * x_stride_h
    codebook_ptr += head * codebook_stride_h
    indices_ptr += head * num_rows
    crowded_ptr += head * (2 * num_rows + HEADER)
    ready_ptr += head * (FACTS * PROGRAMS + padded + num_blocks * BLOCK_K)
    mean_ptr = ready_ptr + FACTS * PROGRAMS
    halves_ptr = mean_ptr + padded
    code_exponent = tl.load(ready_ptr).to(tl.int32)
    local = tl.arange(0, TAKEN)  # [TAKEN]
    # Of a column's codes.
    offs_code = local // GROUP * BLOCK_K + local % GROUP * 8  # [TAKEN]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < width  # [BLOCK_D]
    mean = tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)  # [BLOCK_D]
    for item in range(tl.program_id(0), tl.load(crowded_ptr), tl.num_programs(0)):
        row = tl.load(crowded_ptr + HEADER + 2 * item).to(tl.int64)
        wanted = tl.load(crowded_ptr + HEADER + 2 * item + 1)
        x = tl.load(x_ptr + row * x_stride_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        x = tl.where(mask_d, x - mean, 0.0)  # [BLOCK_D]
        exponent = tl.minimum(scale_exponent(tl.max(tl.abs(x), axis=0)), code_exponent - _LEAST_FACTOR)
        scale = power_of_two(exponent)
        x = (x * scale)[None, :]  # [1, BLOCK_D]
        least = tl.full([TAKEN], float("inf"), tl.float32)  # [TAKEN]
        found = tl.zeros([TAKEN], tl.int32) + num_codes  # [TAKEN]
        for column in range(BLOCK_K // GROUP):
            if (wanted >> column) & 1:
                for first in range(0, num_blocks * GROUP, TAKEN):
                    offs_k = first // GROUP * BLOCK_K + _first_of(column, GROUP) + offs_code  # [TAKEN]
                    mask_k = offs_k < num_codes  # [TAKEN]
                    half = tl.load(halves_ptr + offs_k, mask=mask_k, other=UNUSABLE)  # [TAKEN]
                    codes_ptrs = codebook_ptr + offs_k.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]
                    codes = tl.load(codes_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0)  # [TAKEN, BLOCK_D]
                    codes = (codes.to(tl.float32) - mean[None, :]) * scale  # [TAKEN, BLOCK_D]
                    score = tl.sum(tl.where(mask_d[None, :], codes * (codes / 2 - x), 0.0), axis=1)  # [TAKEN]
                    nearer = (score < least) | ((score == least) & (offs_k < found))  # [TAKEN]
                    better = nearer & (half < UNUSABLE) & (tl.abs(score) < float("inf"))  # [TAKEN]
                    least = tl.where(better, score, least)  # [TAKEN]
                    found = tl.where(better, offs_k, found)  # [TAKEN]
        score = tl.min(least, axis=0)
        index = tl.min(tl.where(least == score, found, num_codes), axis=0)
        # Unscaled in two steps to stay in range.
        finite = tl.abs(score * power_of_two(-exponent) * power_of_two(-exponent)) < float("inf")
        tl.store(indices_ptr + row, index.to(tl.int64), mask=finite)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, mode: str, undecided: Tensor | None = None) -> Tensor:
    """Index of the nearest code, as `fastvq.ops.nearest_code` defines it.

    Args:
        x: [H, N, D], float32, bfloat16 or float16, any strides; D <= 512.
        codebook: [H, K, D], any of these types, on the same device.
        mode: ``exact``, or ``fast``: no group of codes but the one that looks nearest is compared in float32, except
            for vectors that may have a code beyond reach as their nearest. The squared distance of the code found
            exceeds the least by at most 4 E of the module's bound, which is below
            2^-7 |x| max|c| + 2^-14 max|c|^2 for x and c as centred and codes within reach: up to 8 to 16 times as long
            as nearly all vectors or the shortest code.
        undecided: int32 [2], to which is added how many vectors had two groups of codes compared, and how many all
            codes.

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
    sums = x.new_empty(codebook.shape, dtype=torch.float32)
    counts = x.new_empty(codebook.shape[:2], dtype=torch.int64)
    if not x.numel():
        return x.new_zeros(x.shape[0], dtype=torch.float32), sums.zero_(), counts.zero_(), indices.zero_()
    with on_device(x.device):
        crowded = _search(x, codebook, indices, mode == "exact", -1, (sums, counts))
        error = assignment_statistics(x, codebook, indices, mask, sums, counts, crowded, deterministic)
    return error, sums, counts, indices


class _Plan(NamedTuple):
    """How codes are made ready and searched, and how crowded vectors are settled."""

    prepare: Preparation
    search: Launcher
    settle: Launcher


@planned
def _plan(x: Form, codebook: Form, exact: bool, none: int, clear: bool) -> _Plan:
    heads, num_rows, width = x.shape
    num_codes = codebook.shape[1]
    if width > _LARGEST_WIDTH:
        raise UnavailableError(f"x: expected vectors of at most {_LARGEST_WIDTH} numbers for Triton, got {width}")
    capability, processors = hardware(x.device)
    tiles = search_tiles(width, num_codes, capability)
    chunks, blocks = triton.cdiv(width, tiles.block_d), triton.cdiv(num_codes, tiles.block_k)
    padded, padded_codes = chunks * tiles.block_d, blocks * tiles.block_k
    wide = max(16, triton.next_power_of_2(width))
    prepare = preparation(codebook, x, padded_codes, padded, processors, clear=clear)
    options = {
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "BLOCK_D": tiles.block_d,
        "CHUNKS": chunks,
        "GROUP": tiles.group,
        "BITS": (blocks - 1).bit_length(),
        "PROGRAMS": prepare.programs,
        "EXACT": exact,
        "COMPARED": min(_COMPARED, wide) if 90 <= capability < 100 and width <= 128 else _COMPARED_IF_SHORT,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSE,
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    strides = *x.strides[:2], *codebook.strides[:2]
    grid = min(triton.cdiv(num_rows, tiles.block_n), tiles.programs * processors), heads
    numbers = *strides, num_rows, width, padded, blocks, none
    search = Launcher(_search_kernel, grid, numbers, options)
    numbers = *strides, num_rows, num_codes, width, padded, blocks
    options = {
        **{name: options[name] for name in ("PROGRAMS", "BLOCK_K", "GROUP")},
        "TAKEN": min(_TAKEN_ELEMENTS // wide, triton.next_power_of_2(blocks * tiles.group)),
        "BLOCK_D": wide,
        "num_warps": _TAKEN_WARPS,
        **FUSE,
    }
    crowded = Launcher(_crowded_kernel, (min(num_rows, 2 * processors), heads), numbers, options)
    return _Plan(prepare, search, crowded)


def _search(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    exact: bool,
    none: int,
    totals: tuple[Tensor, Tensor] | None,
    undecided: Tensor | None = None,
) -> Tensor:
    """Fills indices [H, N], and sets totals (sums and counts) to zero. Returns the list of crowded vectors."""
    heads, num_rows = indices.shape
    plan = _plan(form(x), form(codebook), exact, none, totals is not None)
    ready, codes16 = plan.prepare.ready(x, heads), plan.prepare.codes16(x, heads)
    crowded = x.new_empty((heads, HEADER.value + 2 * num_rows), dtype=torch.int32)
    plan.prepare.launch(codebook, x, ready, codes16, crowded, *(totals or (None, None)))
    plan.search(x, codebook, ready, codes16, indices, crowded, undecided)
    plan.settle(x, codebook, ready, crowded, indices)
    return crowded


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()
