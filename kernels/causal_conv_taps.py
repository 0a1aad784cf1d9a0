"""The taps of a masked convolution that are read, as kernels of the library's convolutions, and their gradients back.

`pack` takes them out of weights [O, C, k, k] for each of one or two convolutions, [O, rows, columns, C] as the library
multiplies channels-last images, in the type of the products, with outputs and channels filled up with zeros. `unpack`
brings the gradients back and adds up the bias's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.causal_surroundings import require_countable
from fastvq.kernels.launch import cdiv, launch

__all__ = ["pack", "unpack"]

# Values of a block, and taps of it at most.
_BLOCK, _MOST_TAPS = 2048, 32


@triton.jit
def _pack_kernel(
    weight_ptr, out_ptr, outputs, depth, taps, count, of_first, padded_outputs, pitch, blocks_c, blocks,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out [padded_outputs, taps of a part, pitch], one part after the other, from weight [outputs, depth, taps].

    Of the taps the first ``count`` are read, the first ``of_first`` of them by the first part.
    """
    output = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offs_c = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offs_t = block // blocks_c * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask_t = offs_t < count  # [BLOCK_T]
    weight_ptrs = weight_ptr + (output * depth + offs_c[:, None]) * taps + offs_t[None, :]  # [BLOCK_C, BLOCK_T]
    mask_c = offs_c < tl.where(output < outputs, depth, 0)  # [BLOCK_C]
    mask = mask_c[:, None] & mask_t[None, :]  # [BLOCK_C, BLOCK_T]
    value = tl.load(weight_ptrs, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_T]
    of_second = padded_outputs * of_first + output * (count - of_first) - of_first
    place = tl.where(offs_t < of_first, output * of_first, of_second) + offs_t  # [BLOCK_T]
    out_ptrs = out_ptr + place[:, None] * pitch + offs_c[None, :]  # [BLOCK_T, BLOCK_C]
    tl.store(out_ptrs, tl.trans(value), mask=mask_t[:, None] & (offs_c < pitch)[None, :])


@triton.jit
def _unpack_kernel(
    first_ptr, second_ptr, sums_ptr, out_ptr, bias_ptr, outputs, depth, taps, of_first, of_second, pitch, splits,
    blocks_c, blocks, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out [outputs, depth, taps] from up to two parts [..., taps of it, pitch]; bias from sums [splits, outputs]."""
    output = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offs_c = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offs_t = block // blocks_c * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    mask_c = offs_c < depth  # [BLOCK_C]
    value = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)  # [BLOCK_T, BLOCK_C]
    if first_ptr is not None:
        first_ptrs = first_ptr + (output * of_first + offs_t)[:, None] * pitch + offs_c[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (offs_t < of_first)[:, None] & mask_c[None, :]  # [BLOCK_T, BLOCK_C]
        value += tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    if second_ptr is not None:
        local = offs_t - of_first  # [BLOCK_T]
        second_ptrs = second_ptr + (output * of_second + local)[:, None] * pitch + offs_c[None, :]  # [BLOCK_T, BLOCK_C]
        mask = ((local >= 0) & (local < of_second))[:, None] & mask_c[None, :]  # [BLOCK_T, BLOCK_C]
        value += tl.load(second_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    out_ptrs = out_ptr + (output * depth + offs_c[:, None]) * taps + offs_t[None, :]  # [BLOCK_C, BLOCK_T]
    tl.store(out_ptrs, tl.trans(value), mask=mask_c[:, None] & (offs_t < taps)[None, :])
    if block == 0:
        total = tl.zeros([BLOCK_S], tl.float32)  # [BLOCK_S]
        for start in range(0, splits, BLOCK_S):
            offs_s = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            sums_ptrs = sums_ptr + offs_s.to(tl.int64) * outputs + output  # [BLOCK_S]
            total += tl.load(sums_ptrs, mask=offs_s < splits, other=0.0)  # [BLOCK_S]
        tl.store(bias_ptr + output, tl.sum(total, axis=0))


class _Blocks(NamedTuple):
    """Channels and taps of a block, blocks of channels, and blocks of one output."""

    channels: int
    taps: int
    of_channels: int
    count: int


@functools.cache
def _blocks(depth: int, taps: int) -> _Blocks:
    block_t = min(_MOST_TAPS, triton.next_power_of_2(taps))
    block_c = min(_BLOCK // block_t, 256, max(16, triton.next_power_of_2(depth)))
    of_channels = cdiv(depth, block_c)
    return _Blocks(block_c, block_t, of_channels, of_channels * cdiv(taps, block_t))


def pack(weight: Tensor, counts: tuple[int, ...], outputs: int, pitch: int, dtype: torch.dtype) -> Tensor:
    """The first taps of weight [O, C, k, k], so many for each of one or two parts: [outputs, count, pitch] each.

    Returns:
        [outputs * all counts, pitch], one part after the other; weight itself where it is that already.
    """
    given, depth, kernel, _ = weight.shape
    weight, total = weight.contiguous(), sum(counts)
    if kernel == 1 and given == outputs and depth == pitch and weight.dtype == dtype:
        return weight.view(outputs, pitch)
    require_countable("weight: expected elements", max(weight.numel(), outputs * total * pitch))
    out = weight.new_empty((outputs * total, pitch), dtype=dtype)
    blocks = _blocks(pitch, total)
    launch(
        _pack_kernel, (outputs * blocks.count, 1, 1), weight.device,
        (weight, out),
        (given, depth, kernel * kernel, total, counts[0], outputs, pitch, blocks.of_channels, blocks.count),
        BLOCK_C=blocks.channels, BLOCK_T=blocks.taps, num_warps=4,
    )  # fmt: skip
    return out


def unpack(
    parts: Sequence[Tensor | None], counts: tuple[int, ...], pitch: int, sums: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [O, C, k, k], 0 where it is not read, and of its bias, both of its dtype.

    Args:
        parts: gradients of what `pack` made, in the same memory each; None for 0.
        counts, pitch: as for `pack`.
        sums: float32 [splits, O], of the bias's gradient.
    """
    outputs, depth, kernel, _ = weight.shape
    out, bias = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(outputs)
    if out.numel() == 0:
        return out, bias.zero_()
    require_countable("weight: expected elements", weight.numel())
    (first, second), (of_first, of_second) = (*parts, None, None)[:2], (*counts, 0, 0)[:2]
    blocks = _blocks(depth, kernel * kernel)
    launch(
        _unpack_kernel, (outputs * blocks.count, 1, 1), weight.device,
        (first, second, sums, out, bias),
        (
            outputs, depth, kernel * kernel, of_first, of_second, pitch, sums.shape[0],
            blocks.of_channels, blocks.count,
        ),
        BLOCK_C=blocks.channels, BLOCK_T=blocks.taps, BLOCK_S=256, num_warps=4,
    )  # fmt: skip
    return out, bias
