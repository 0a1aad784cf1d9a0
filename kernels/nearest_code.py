"""Nearest code on a GPU: tensor-core scores of half precision, and float32 scores where those cannot decide.

Each head's codebook is prepared once (`scale_codes`): centred, scaled by a power of two, and rounded to float16, but
for codes far beyond the reach of nearly all vectors. The search (`_search_kernel`) keeps a block of vectors on chip,
likewise centred, scaled and rounded, and passes over the codes with a running minimum. In ``exact`` mode it also keeps
the second smallest score, lists the vectors whose two smallest scores are nearer than the error bound below, and
`_rescore_kernel` scores again, in float32, the codes that the bound leaves as candidates for them. A vector that may
have a code beyond reach as its nearest is listed in either mode, and all those codes are candidates for it: a far code
costs the others neither accuracy nor time.

Float16 rather than bfloat16 or TF32: Hopper multiplies float16 as fast as bfloat16 and twice as fast as TF32; it has
TF32's 11 significant bits, and scaling by powers of two, one per vector and one per codebook, makes up for its range.
So a single product leaves about as few vectors undecided as TF32 does, at half the time; three bfloat16 products would
leave none but take three times as long.

Error bound, for x and c as float32 after centring and scaling, x = xh + xl and c = ch + cl with float16 xh, ch:

    |x.c - xh.ch| <= |xl| |c| + |xh| |cl|           by Cauchy-Schwarz, with the residuals' norms as they are, which is
                                                    three times sharper than 2^-11 (|x| |c| + |x| |c|)
    |xh.ch - computed| <= D 2^-22 |xh| |ch|         products are exact in float32; each addition errs by at most four
                                                    units of 2^-24 of the sum of magnitudes: tensor cores truncate
                                                    terms when aligning them, and truncate the sum
    packing the column: (BLOCK_K + 4) 2^-23 score   the lowest bits of a score hold its column

With E their sum, |c| being the largest within reach, the nearest code's computed score is at most 2 E above the
smallest. The score of a code of at least length F, F > |x|, is at least F^2 / 2 - |x| F: a vector whose least score and
E are together below that need not look beyond reach. What remains of a candidate's error is that of float32 arithmetic:
about u |x| |c|, c being the candidate, which keeps the distance of the code found within 16 u (|x| + |c|)^2, u = 2^-24,
of the least one, c being the farther of the code found and the nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import UnavailableError
from fastvq.kernels.code_statistics import assignment_statistics
from fastvq.kernels.launch import hardware, on_device
from fastvq.kernels.scaled_codes import BEYOND, FUSE, NOTHING, power_of_two, scale_codes, scale_exponent

__all__ = ["nearest_code", "nearest_code_statistics"]

# A row's scale exceeds the codes' by at most 2^20, so that products of tiny rows do not underflow in a score; products
# count at most 2^60 times in a score, where half norms are already far below their rounding.
_LEAST_FACTOR: tl.constexpr = tl.constexpr(-20)
_LARGEST_FACTOR: tl.constexpr = tl.constexpr(60)

# Wider vectors would not leave room on chip.
_LARGEST_WIDTH = 512


class Tiles(NamedTuple):
    """Block sizes of the search: vectors, codes, depth; warps and pipeline stages."""

    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


def search_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_search_kernel` for vectors of ``width`` and a compute ``capability`` such as 90.

    128 vectors, since with fewer the codes would have to come from L2 faster than it gives them. 64 codes, since two
    programs of 8 warps and 128 registers then fit on a multiprocessor and one multiplies while the other compares.
    Vectors wider than 128 leave no shared memory for two programs: on Hopper one takes 128 codes at a time, and where
    registers hold the vectors (`_large_multiprocessor`) or beyond 256 the blocks shrink.
    """
    depth = _depth_block(width)
    codes = max(16, triton.next_power_of_2(num_codes))
    if width <= 128:
        return Tiles(128, min(64, codes), depth, 8, 3)
    if width <= 256 and _large_multiprocessor(capability):
        return Tiles(128, min(128 if capability == 90 else 64, codes), depth, 8, 2)
    block_k = 64 if width <= 256 or _large_multiprocessor(capability) else 32
    return Tiles(64, min(block_k, codes), depth, 4, 2)


def rescore_tiles(width: int, num_codes: int, capability: int) -> Tiles:
    """Tiles of `_rescore_kernel`: small ones, since a program does as many rounds as its least decided vector."""
    codes = max(16, triton.next_power_of_2(num_codes))
    if not _large_multiprocessor(capability):
        return Tiles(64, min(64, codes), _depth_block(width), 8, 2)
    if width <= 256:
        return Tiles(64, min(64, codes), _depth_block(width), 4, 2)
    return Tiles(32, min(32, codes), _depth_block(width), 4, 2)


def _large_multiprocessor(capability: int) -> bool:
    """Hopper and data-centre Blackwell: operands of matrix products in shared memory, of which there are 227 KiB."""
    return 90 <= capability < 120


def _depth_block(width: int) -> int:
    return min(64, max(16, triton.next_power_of_2(width)))


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
def _scaled(x_ptr, offs_x, mask_n, mean_ptr, scale, offs_d, width):
    """Columns offs_d [BLOCK_D] of the rows at offs_x [R], centred and scaled, float32 [R, BLOCK_D]."""
    mask = mask_n[:, None] & (offs_d < width)[None, :]  # [R, BLOCK_D]
    x_ptrs = x_ptr + offs_x[:, None] + offs_d[None, :]  # [R, BLOCK_D]
    values = tl.load(x_ptrs, mask=mask, other=0.0)  # [R, BLOCK_D]
    centred = values.to(tl.float32) - tl.load(mean_ptr + offs_d)[None, :]  # [R, BLOCK_D]
    return tl.where((offs_d < width)[None, :], centred, 0.0) * scale[:, None]


@triton.jit
def _half_rows(x_ptr, offs_x, mask_n, mean_ptr, scale, width, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows rounded to float16, CHUNKS x [R, BLOCK_D], and the norms [R] of them and of their residuals."""
    local = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    squares = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    residual_squares = tl.zeros([offs_x.shape[0]], tl.float32)  # [R]
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        values = _scaled(x_ptr, offs_x, mask_n, mean_ptr, scale, chunk * BLOCK_D + local, width)  # [R, BLOCK_D]
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
def _search_kernel(
    x_ptr, x_stride_h, x_stride_n, mean_ptr, exponents_ptr, bounds_ptr, halves_ptr, codes16_ptr, indices_ptr,
    limits_ptr, undecided_ptr, num_undecided_ptr, num_rows, width, padded, num_blocks, none,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Index of the smallest score of each vector, ``none`` where no score is finite."""
    head = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < num_rows  # [BLOCK_N]
    offs_x = head * x_stride_h + offs_n * x_stride_n  # [BLOCK_N]
    mean_ptr += head * padded
    codes16_ptr += head * num_blocks * BLOCK_K * padded
    halves_ptr += head * num_blocks * BLOCK_K
    code_exponent = tl.load(exponents_ptr + head * 2)
    code_norm = tl.load(bounds_ptr + head * 2)

    # [BLOCK_N], as is all that follows from them up to the loop.
    exponent, factor_exponent = _row_exponent(x_ptr, offs_x, mask_n, mean_ptr, code_exponent, width, BLOCK_D, CHUNKS)
    factor = power_of_two(factor_exponent)
    scale = power_of_two(exponent)
    # CHUNKS x [BLOCK_N, BLOCK_D], [BLOCK_N], [BLOCK_N]
    chunks, norm, residual_norm = _half_rows(x_ptr, offs_x, mask_n, mean_ptr, scale, width, BLOCK_D, CHUNKS)
    # Makes every score at least 1: then the order of scores is that of their bits, and among equal scores packing
    # the column into the lowest bits makes the first the smallest. 1.01 covers the rounding of norms and products.
    shift = 1.01 * factor * norm * code_norm + 1
    # Few numbers for each vector, since they stay in registers while codes pass by.
    code_residual = tl.load(bounds_ptr + head * 2 + 1)
    error = residual_norm * code_norm + norm * (code_residual + padded * (2.0**-22) * code_norm)
    error = 1.01 * factor * error
    # Below it no score is that of a code beyond reach. 1.01 and 0.99 cover the rounding of lengths. A lesser `far`
    # claims less, and its square stays in range.
    far_exponent = tl.load(exponents_ptr + head * 2 + 1)
    far = 0.99 * power_of_two(tl.minimum(far_exponent + code_exponent, 60))
    far = tl.where(far_exponent < NOTHING, far, float("inf"))
    length = 1.01 * factor * (norm + residual_norm)
    horizon = tl.where(far > length, far * (far / 2 - length), -float("inf"))

    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    low: tl.constexpr = BLOCK_K - 1
    least = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N]
    second = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N]
    found = tl.zeros([BLOCK_N], tl.int32)  # [BLOCK_N]
    for block in range(num_blocks):
        offs_k = block * BLOCK_K + local  # [BLOCK_K]
        acc = _products(chunks, codes16_ptr, offs_k, padded, BLOCK_D, CHUNKS)  # [BLOCK_N, BLOCK_K]
        # In this order everything is in the layout of acc, and the first two operations are one.
        scores = tl.load(halves_ptr + offs_k)[None, :] - acc * factor[:, None] + shift[:, None]  # [BLOCK_N, BLOCK_K]
        packed = (scores.to(tl.int32, bitcast=True) & ~low) | local[None, :]
        packed = packed.to(tl.float32, bitcast=True)  # [BLOCK_N, BLOCK_K], no two equal in a row
        if EXACT:
            left, right = tl.split(tl.reshape(packed, [BLOCK_N, BLOCK_K // 2, 2]))  # [BLOCK_N, BLOCK_K / 2] each
            smaller, larger = tl.minimum(left, right), tl.maximum(left, right)  # [BLOCK_N, BLOCK_K / 2] each
            first = tl.min(smaller, axis=1)  # [BLOCK_N]
            after = tl.min(tl.where(smaller == first[:, None], larger, smaller), axis=1)  # [BLOCK_N]
            second = tl.minimum(tl.minimum(second, after), tl.maximum(first, least))  # [BLOCK_N]
        else:
            first = tl.min(packed, axis=1)  # [BLOCK_N]
        bits = first.to(tl.int32, bitcast=True)  # [BLOCK_N]
        first = (bits & ~low).to(tl.float32, bitcast=True)
        better = first < least  # [BLOCK_N]
        found = tl.where(better, block * BLOCK_K + (bits & low), found)  # [BLOCK_N]
        least = tl.where(better, first, least)  # [BLOCK_N]

    # Not finite: no usable code, NaN, or a score that float32 cannot hold once unscaled, in two steps to stay in range.
    # All blocks are [BLOCK_N] from here on.
    unscale = -(code_exponent + exponent + factor_exponent)
    half = unscale >> 1
    score = (least - shift) * power_of_two(half) * power_of_two(unscale - half)
    finite = (least < BEYOND / 2) & (tl.abs(score) < float("inf"))
    tl.store(indices_ptr + head * num_rows + offs_n, tl.where(finite, found, none).to(tl.int64), mask=mask_n)
    error += 1.01 * (BLOCK_K + 4) * (2.0**-23) * least
    beyond = (least - shift + error < horizon) == 0
    unsure = beyond
    if EXACT:
        unsure = unsure | ((second > least + 2 * error) == 0)
    unsure = unsure & mask_n & finite
    tl.store(limits_ptr + head * num_rows + offs_n, least - shift + 2 * error, mask=unsure)
    marks = unsure.to(tl.int32)
    offs_slot = tl.atomic_add(num_undecided_ptr + head, tl.sum(marks, axis=0)) + tl.cumsum(marks, axis=0) - marks
    # Negative where codes beyond reach are candidates too.
    listed = tl.where(beyond, -1 - offs_n, offs_n).to(tl.int32)
    tl.store(undecided_ptr + head * num_rows + offs_slot, listed, mask=unsure)


@triton.jit
def _rescore_kernel(
    x_ptr, x_stride_h, x_stride_n, mean_ptr, exponents_ptr, halves_ptr, codes16_ptr, codes32_ptr, indices_ptr,
    limits_ptr, undecided_ptr, num_undecided_ptr, num_rows, width, padded, num_blocks, num_padded_codes,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Float32 scores of the candidates of the listed vectors: codes whose float16 score is within the limit, and those
    beyond reach where the list says so.
    """
    head = tl.program_id(1).to(tl.int64)
    mean_ptr += head * padded
    codes16_ptr += head * num_padded_codes * padded
    codes32_ptr += head * num_padded_codes * padded
    halves_ptr += head * num_padded_codes
    code_exponent = tl.load(exponents_ptr + head * 2)
    local = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    number = tl.load(num_undecided_ptr + head)
    for first in range(tl.program_id(0) * BLOCK_N, number, tl.num_programs(0) * BLOCK_N):
        offs_slot = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_slot < number  # [BLOCK_N]
        listed = tl.load(undecided_ptr + head * num_rows + offs_slot, mask=mask_n, other=0)  # [BLOCK_N]
        beyond = listed < 0  # [BLOCK_N]
        offs_n = tl.where(beyond, -1 - listed, listed).to(tl.int64)  # [BLOCK_N]
        offs_x = head * x_stride_h + offs_n * x_stride_n  # [BLOCK_N]
        # [BLOCK_N] each.
        exponent, factor_exponent = _row_exponent(
            x_ptr, offs_x, mask_n, mean_ptr, code_exponent, width, BLOCK_D, CHUNKS
        )
        factor = power_of_two(factor_exponent)
        scale = power_of_two(exponent)
        # CHUNKS x [BLOCK_N, BLOCK_D], [BLOCK_N], [BLOCK_N]
        chunks, _norm, _residual_norm = _half_rows(x_ptr, offs_x, mask_n, mean_ptr, scale, width, BLOCK_D, CHUNKS)
        limit = tl.load(limits_ptr + head * num_rows + offs_n, mask=mask_n, other=-float("inf"))  # [BLOCK_N]
        least = tl.full([BLOCK_N], float("inf"), tl.float32)  # [BLOCK_N]
        found = tl.zeros([BLOCK_N], tl.int32)  # [BLOCK_N]
        for block in range(num_blocks):
            offs_k = block * BLOCK_K + local  # [BLOCK_K]
            acc = _products(chunks, codes16_ptr, offs_k, padded, BLOCK_D, CHUNKS)  # [BLOCK_N, BLOCK_K]
            half = tl.load(halves_ptr + offs_k)  # [BLOCK_K]
            scores = half[None, :] - acc * factor[:, None]  # [BLOCK_N, BLOCK_K]
            # [BLOCK_N, BLOCK_K] each.
            candidate = (scores <= limit[:, None]) | (beyond[:, None] & (half == BEYOND)[None, :])
            left = tl.where(candidate & mask_n[:, None], local[None, :], BLOCK_K)
            rounds = tl.max(tl.sum((left < BLOCK_K).to(tl.int32), axis=1), axis=0)
            for _step in range(rounds):
                column = tl.min(left, axis=1)  # [BLOCK_N]
                left = tl.where(left == column[:, None], BLOCK_K, left)  # [BLOCK_N, BLOCK_K]
                mask_code = column < BLOCK_K  # [BLOCK_N]
                offs_code = block * BLOCK_K + tl.where(mask_code, column, 0)  # [BLOCK_N]
                product = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
                square = tl.zeros([BLOCK_N], tl.float32)  # [BLOCK_N]
                for chunk in range(CHUNKS):
                    offs_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
                    values = _scaled(x_ptr, offs_x, mask_code, mean_ptr, scale, offs_d, width)  # [BLOCK_N, BLOCK_D]
                    mask = mask_code[:, None]  # [BLOCK_N, 1]
                    codes_ptrs = codes32_ptr + offs_code[:, None] * padded + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
                    other = tl.load(codes_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
                    # By the vector's scale: codes beyond reach have none.
                    other = other * scale[:, None]  # [BLOCK_N, BLOCK_D]
                    product += tl.sum(values * other, axis=1)  # [BLOCK_N]
                    square += tl.sum(other * other, axis=1)  # [BLOCK_N]
                score = square / 2 - product  # [BLOCK_N]
                better = mask_code & (score < least)  # [BLOCK_N]
                least = tl.where(better, score, least)  # [BLOCK_N]
                found = tl.where(better, offs_code, found)  # [BLOCK_N]
        mask_n = mask_n & (least < float("inf"))  # [BLOCK_N]
        tl.store(indices_ptr + head * num_rows + offs_n, found.to(tl.int64), mask=mask_n)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor, *, mode: str) -> Tensor:
    """Index of the nearest code, as `fastvq.ops.nearest_code` defines it.

    Args:
        x: [H, N, D], float32, bfloat16 or float16, any strides; D <= 512.
        codebook: [H, K, D], any of these types, on the same device.
        mode: ``exact``, or ``fast``: no score is computed again in float32 but for codes beyond reach. The squared
            distance of the code found exceeds the least by at most 4 E of the module's bound, which is below
            2^-7 |x| max|c| + 2^-14 max|c|^2 for x and c as centred and codes within reach: up to 8 to 16 times as long
            as nearly all vectors or the shortest code.

    Returns:
        int64 [H, N]; 0 where no code has a finite score.
    """
    with on_device(x.device):
        return _search(_unit_stride(x), _unit_stride(codebook), mode == "exact", none=0)


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
    with on_device(x.device):
        x, codebook = _unit_stride(x), _unit_stride(codebook)
        indices = _search(x, codebook, mode == "exact", none=-1)
        return *assignment_statistics(x, codebook, indices, mask, deterministic), indices


def _search(x: Tensor, codebook: Tensor, exact: bool, none: int) -> Tensor:
    heads, num_rows, width = x.shape
    num_codes = codebook.shape[1]
    indices = x.new_empty((heads, num_rows), dtype=torch.int64)
    if indices.numel() == 0 or width == 0:
        return indices.zero_()
    if width > _LARGEST_WIDTH:
        raise UnavailableError(f"x: expected vectors of at most {_LARGEST_WIDTH} numbers for Triton, got {width}")
    capability, processors = hardware(x.device)
    tiles = search_tiles(width, num_codes, capability)
    again = rescore_tiles(width, num_codes, capability)
    chunks = triton.cdiv(width, tiles.block_d)
    padded = chunks * tiles.block_d
    rows = max(tiles.block_k, again.block_k)
    padded_codes = triton.cdiv(num_codes, rows) * rows
    codes = scale_codes(codebook, x, padded_codes, padded)
    limits = x.new_empty((heads, num_rows), dtype=torch.float32)
    undecided = x.new_empty((heads, num_rows), dtype=torch.int32)
    num_undecided = x.new_zeros(heads, dtype=torch.int32)
    _search_kernel[(triton.cdiv(num_rows, tiles.block_n), heads)](
        x, x.stride(0), x.stride(1), codes.mean, codes.exponents, codes.bounds, codes.halves, codes.codes16,
        indices, limits, undecided, num_undecided, num_rows, width, padded, padded_codes // tiles.block_k, none,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d, CHUNKS=chunks, EXACT=exact,
        num_warps=tiles.warps, num_stages=tiles.stages, **FUSE,
    )  # fmt: skip
    # How many vectors are listed only the device knows: a fixed grid strides over them.
    programs = min(triton.cdiv(num_rows, again.block_n), 2 * processors)
    _rescore_kernel[(programs, heads)](
        x, x.stride(0), x.stride(1), codes.mean, codes.exponents, codes.halves, codes.codes16, codes.codes32,
        indices, limits, undecided, num_undecided, num_rows, width, padded, padded_codes // again.block_k,
        padded_codes,
        BLOCK_N=again.block_n, BLOCK_K=again.block_k, BLOCK_D=again.block_d, CHUNKS=chunks,
        num_warps=again.warps, num_stages=again.stages, **FUSE,
    )  # fmt: skip
    return indices


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()
