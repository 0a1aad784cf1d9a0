"""A codebook made ready for the tensor cores in one launch: centred, scaled by a power of two, rounded to float16.

No single code may decide how the others are centred and scaled. Lengths are told apart by their exponents:

- The centre is the mean of the short codes: those whose exponent is at most one above that of the second shortest. A
  code far away has no part in it, and data far from the origin keep theirs, whose codes are all about as long.
- Codes beyond reach are those 8 times as long, once centred, as nearly all vectors (a sample of them) and as the
  shortest code. They are left out of the scale, of the bounds and of the search over float16. Such a code c can be
  nearest to x only if |c| <= |x| + the distance found, so a vector with |x| well below |c| does not have to know it.

Programs cannot wait for each other, so that each works out centre and scale for itself, from a sample of the codes that
its registers hold: all of them up to K 512 at D 64 (`sample_size`). In a larger codebook codes twice as long as the
longest of the sample are within reach too, and longer ones are beyond. Centre, scale and reach decide how many vectors
the float16 scores leave undecided; no result depends on them. What does, the largest norm within reach and the length
of the shortest code beyond, every program writes for its own codes, and the search takes the extremes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.launch import Form, Launcher

__all__ = [
    "BEYOND",
    "FACTS",
    "FUSE",
    "HEADER",
    "UNUSABLE",
    "Preparation",
    "exponent_of",
    "power_of_two",
    "preparation",
    "scale_exponent",
]

# Magnitudes that scaling aims at: below the largest float16 (65504) after rounding up, far above its least (6e-8).
_TOP: tl.constexpr = tl.constexpr(14)
# Scaled half norm of a code that must not be chosen, and of one beyond reach: greater than every score of a code that
# takes part in the search, about 2^101 at most.
UNUSABLE: tl.constexpr = tl.constexpr(2.0**120)
BEYOND: tl.constexpr = tl.constexpr(2.0**119)
# Codes beyond this have no finite half norm in float32.
_LARGEST: tl.constexpr = tl.constexpr(2.0**62)
# Number of exponents of lengths, the first being that of 2^-127, and more than any.
_BINS: tl.constexpr = tl.constexpr(256)
_ZERO_BIN: tl.constexpr = tl.constexpr(127)
_NO_BIN: tl.constexpr = tl.constexpr(1000)
# Twice as long as the ends of their bins, and 8 times.
_REACH: tl.constexpr = tl.constexpr(4)
# Numbers that each program writes and the search joins: the exponent of the scale, the largest norm of a scaled code
# within reach, that of a residual of its rounding, and the least length beyond.
FACTS: tl.constexpr = tl.constexpr(4)
# Numbers before a list of crowded vectors: how many there are, how many programs have finished statistics, two unused.
HEADER: tl.constexpr = tl.constexpr(4)
# Stated, because Triton's default is about to change: a score is one fused operation less.
FUSE = {"enable_fp_fusion": True}

_WARPS = 16
_SAMPLE_ELEMENTS = 1 << 15
_LARGEST_SAMPLE = 512


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """Exponent of a float32 number >= 0, -127 where it is not normal."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def scale_exponent(largest):
    """Exponent that brings ``largest`` >= 0 into [2^_TOP, 2^(_TOP + 1)); less for what is below 2^-100."""
    # The block comes first: what a constant computes with one is a constant to the interpreter of Triton 3.8.
    return -tl.maximum(exponent_of(largest), -100) + _TOP


@triton.jit
def _load_codes(codebook_ptr, codebook_stride_k, offs_k, num_codes, width, offs_d):
    """Codes offs_k [K] as float32 [K, D], zeros where they are not usable, and which are, as bool [K]."""
    mask = (offs_k < num_codes)[:, None] & (offs_d < width)[None, :]  # [K, D]
    codebook_ptrs = codebook_ptr + offs_k.to(tl.int64)[:, None] * codebook_stride_k + offs_d[None, :]  # [K, D]
    codes = tl.load(codebook_ptrs, mask=mask, other=0.0)  # [K, D]
    codes = codes.to(tl.float32)
    bad = (tl.abs(codes) < _LARGEST) == 0  # [K, D]
    usable = (offs_k < num_codes) & (tl.max(bad.to(tl.int32), axis=1) == 0)  # [K]
    return tl.where(usable[:, None], codes, 0.0), usable


@triton.jit
def _length_bins(values):
    """Exponent of the length of each row of values [R, D], as a number of a bin [R]; -1 where it is not finite."""
    top = tl.max(tl.abs(values), axis=1)  # [R]
    exponent = tl.minimum(tl.maximum(exponent_of(top), -100), 126)  # [R]
    scaled = values * power_of_two(-exponent)[:, None]  # [R, D]
    squares = tl.sum(scaled * scaled, axis=1)  # [R]
    # Shifted down rather than divided, which is the floor of half a negative exponent too.
    length = exponent + (exponent_of(squares) >> 1)  # [R]
    return tl.where(squares < float("inf"), tl.maximum(length + _ZERO_BIN, 0), -1)


@triton.jit
def _spread(offs_s, total, SAMPLE: tl.constexpr):
    """One of ``total`` for each of SAMPLE numbers offs_s, all if they are no more; no period of theirs is met."""
    begin = offs_s * total // SAMPLE  # [SAMPLE]
    size = tl.maximum((offs_s + 1) * total // SAMPLE - begin, 1)  # [SAMPLE]
    return begin + (offs_s * 7919 + 13) % size


@triton.jit
def _short_mean(codes, usable):
    """Mean [D] of the short codes among codes [S, D]."""
    bins = tl.where(usable, _length_bins(codes), _NO_BIN)  # [S]
    least = tl.min(bins, axis=0)
    other = tl.min(tl.where(bins == least, _NO_BIN, bins), axis=0)
    alone = (tl.sum((bins == least).to(tl.int32), axis=0) == 1) & (other < _NO_BIN)
    short = usable & (bins <= tl.where(alone, other, least) + 1)  # [S]
    number = tl.maximum(tl.sum(short.to(tl.int32), axis=0), 1)
    return tl.sum(tl.where(short[:, None], codes, 0.0), axis=0) / number.to(tl.float32)


@triton.jit
def _typical_bin(bins):
    """The bin of 256 that 15 of 16 of bins [S] do not exceed, those below 0 left out."""
    number = tl.sum((bins >= 0).to(tl.int32), axis=0)
    found = 0
    for step in tl.static_range(8):
        middle = found + (128 >> step)
        below = tl.sum(((bins >= 0) & (bins < middle)).to(tl.int32), axis=0)
        found = tl.where(16 * below < 15 * number, middle, found)
    return found


@triton.jit
def _prepare_kernel(
    codebook_ptr, x_ptr, ready_ptr, codes16_ptr, crowded_ptr, sums_ptr, counts_ptr,
    codebook_stride_h, codebook_stride_k, x_stride_h, x_stride_n, num_codes, num_rows, width, padded, padded_codes,
    ready_size,
    CLEAR: tl.constexpr, ALL: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """See `preparation`; ALL says that the sample holds all codes, CLEAR that there are statistics to be zeroed."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1).to(tl.int64)
    codebook_ptr += head * codebook_stride_h
    facts_ptr = ready_ptr + head * ready_size
    mean_ptr = facts_ptr + FACTS * programs
    halves_ptr = mean_ptr + padded
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < width  # [BLOCK_D]

    offs_s = tl.arange(0, SAMPLE)  # [SAMPLE]
    offs_code = offs_s if ALL else _spread(offs_s, num_codes, SAMPLE)  # [SAMPLE]
    sample, there = _load_codes(codebook_ptr, codebook_stride_k, offs_code, num_codes, width, offs_d)
    centre = _short_mean(sample, there)  # [BLOCK_D]
    bins = tl.where(there, _length_bins(sample - centre[None, :]), _NO_BIN)  # [SAMPLE]
    offs_n = _spread(offs_s.to(tl.int64), num_rows, SAMPLE)  # [SAMPLE]
    x_ptrs = x_ptr + head * x_stride_h + offs_n[:, None] * x_stride_n + offs_d[None, :]  # [SAMPLE, BLOCK_D]
    vectors = tl.load(x_ptrs, mask=mask_d[None, :] & (offs_n < num_rows)[:, None], other=0.0).to(tl.float32)
    typical = _typical_bin(_length_bins(vectors - centre[None, :]))
    reach = tl.maximum(typical, tl.min(bins, axis=0)) + _REACH
    longest = tl.max(tl.where(bins < reach, bins, 0), axis=0)
    reach = tl.minimum(reach, longest + (1 if ALL else 2))
    exponent = -tl.maximum(reach - 1 - _ZERO_BIN, -100) + _TOP
    if program == 0:
        tl.store(mean_ptr + offs_d, centre, mask=offs_d < padded)
        if crowded_ptr is not None:
            tl.store(crowded_ptr + head * (2 * num_rows + HEADER) + tl.arange(0, HEADER), tl.zeros([HEADER], tl.int32))

    largest = 0.0
    residual = 0.0
    beyond = _BINS
    for first in range(program * BLOCK_K, padded_codes, programs * BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask_k = offs_k < padded_codes  # [BLOCK_K]
        # [BLOCK_K, BLOCK_D], [BLOCK_K]
        codes, usable = _load_codes(codebook_ptr, codebook_stride_k, offs_k, num_codes, width, offs_d)
        codes = tl.where(usable[:, None], codes - centre[None, :], 0.0)
        own = _length_bins(codes)  # [BLOCK_K]
        near = usable & (own < reach)  # [BLOCK_K]
        scaled = tl.where(near[:, None], codes * power_of_two(exponent), 0.0)  # [BLOCK_K, BLOCK_D]
        rounded = scaled.to(tl.float16)  # [BLOCK_K, BLOCK_D]
        rest = scaled - rounded.to(tl.float32)  # [BLOCK_K, BLOCK_D]
        squares = tl.sum(scaled * scaled, axis=1)  # [BLOCK_K]
        half = tl.where(near, squares / 2, tl.where(usable, BEYOND, UNUSABLE))  # [BLOCK_K]
        tl.store(halves_ptr + offs_k, half, mask=mask_k)
        offs = (head * padded_codes + offs_k)[:, None] * padded + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
        tl.store(codes16_ptr + offs, rounded, mask=mask_k[:, None] & (offs_d < padded)[None, :])
        largest = tl.maximum(largest, tl.max(squares, axis=0))
        residual = tl.maximum(residual, tl.max(tl.sum(rest * rest, axis=1), axis=0))
        beyond = tl.minimum(beyond, tl.min(tl.where(usable & (own >= reach), own, _BINS), axis=0))
        if CLEAR:
            real = offs_k < num_codes  # [BLOCK_K]
            offs_total = head * num_codes + offs_k  # [BLOCK_K]
            tl.store(counts_ptr + offs_total, tl.zeros([BLOCK_K], tl.int64), mask=real)
            sums_ptrs = sums_ptr + offs_total[:, None] * width + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
            zeros = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)  # [BLOCK_K, BLOCK_D]
            tl.store(sums_ptrs, zeros, mask=real[:, None] & mask_d[None, :])
    # A lesser length claims less, and its square stays in range.
    far = power_of_two(tl.minimum(tl.minimum(beyond, _BINS - 2) - _ZERO_BIN + exponent, 60))
    tl.store(facts_ptr + program, exponent.to(tl.float32))
    tl.store(facts_ptr + programs + program, tl.sqrt(largest))
    tl.store(facts_ptr + 2 * programs + program, tl.sqrt(residual))
    tl.store(facts_ptr + 3 * programs + program, tl.where(beyond < _BINS, far, float("inf")))


class Preparation(NamedTuple):
    """How codebooks are made ready.

    Attributes:
        launch: of codebooks [H, K, D]; vectors x [H, N, D]; `ready` and `codes16`, to be filled; a list of crowded
            vectors, int32 [H, HEADER + 2 N], of which the header becomes zero, or None; and sums float32 [H, K, D] and
            counts int64 [H, K], which become zero, or None twice. Codebooks and vectors have a last axis of stride 1, N
            and D are not 0.
        programs: P, how many work on a codebook.
        padded_codes, padded: K' and D'; K and D rounded up to whole blocks of the search, filled with zeros.
    """

    launch: Launcher
    programs: int
    padded_codes: int
    padded: int

    def ready(self, x: Tensor, heads: int) -> Tensor:
        """float32 [H, 4 P + D' + K'], still to be filled: the facts of each program (`FACTS`; of the exponents that of
        the first counts, as all are the same), the centre [D'], and half the squared norm of each scaled code [K']:
        2^120 where the code is not usable (not finite, or 2^62 and more), 2^119 where it is beyond reach.
        """
        return x.new_empty((heads, self.ready_size), dtype=torch.float32)

    def codes16(self, x: Tensor, heads: int) -> Tensor:
        """float16 [H, K', D'], still to be filled: the codes scaled and rounded, zeros beyond reach."""
        return x.new_empty((heads, self.padded_codes, self.padded), dtype=torch.float16)

    @property
    def ready_size(self) -> int:
        return FACTS.value * self.programs + self.padded + self.padded_codes


def preparation(
    codebook: Form, x: Form, padded_codes: int, padded: int, processors: int, *, clear: bool = False
) -> Preparation:
    """For codebooks [H, K, D] and x [H, N, D]; ``clear`` says that there are statistics to be zeroed."""
    heads, num_codes, width = codebook.shape
    # A power of two.
    programs = min(1 << processors.bit_length() - 1, triton.next_power_of_2(triton.cdiv(padded_codes, 32)))
    wide = triton.next_power_of_2(padded)
    sample = min(_LARGEST_SAMPLE, _SAMPLE_ELEMENTS // (wide if wide <= 256 else 2 * wide))
    strides = *codebook.strides[:2], *x.strides[:2]
    ready_size = FACTS.value * programs + padded + padded_codes
    options = {
        "CLEAR": clear,
        "ALL": num_codes <= sample,
        "SAMPLE": sample,
        "BLOCK_K": 32 if wide <= 128 else 16,
        "BLOCK_D": wide,
        "num_warps": _WARPS,
        **FUSE,
    }
    numbers = *strides, num_codes, x.shape[1], width, padded, padded_codes, ready_size
    launch = Launcher(_prepare_kernel, (programs, heads), numbers, options)
    return Preparation(launch, programs, padded_codes, padded)
