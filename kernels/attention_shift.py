"""Moving rows of attention by one position, which turns a strict mask into the causal one that libraries know.

Memory is [B, N, heads, width] throughout, as features in channels-last memory are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.kernels.launch import cdiv, launch

__all__ = ["padded"]

# Values of a block.
_BLOCK = 4096


@triton.jit
def _pad_one(
    x_ptr, out_ptr, batch_stride, head_stride, row_stride, down, length, columns, rows,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK_N)
    offs_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = offs_m % length - down  # [BLOCK_M]
    mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]  # [BLOCK_M, BLOCK_N]
    place = offs_m // length * batch_stride + row * row_stride  # [BLOCK_M]
    x_ptrs = x_ptr + place[:, None] + (offs_n // WIDTH * head_stride + offs_n % WIDTH)[None, :]  # [BLOCK_M, BLOCK_N]
    inside = mask & ((row >= 0) & (row < length - 1))[:, None]  # [BLOCK_M, BLOCK_N]
    value = tl.load(x_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
    tl.store(out_ptr + offs_m[:, None] * columns + offs_n[None, :], value, mask=mask)


@triton.jit
def _pad_kernel(
    x_ptr, y_ptr, z_ptr, of_x_ptr, of_y_ptr, of_z_ptr,
    x_batch, x_head, x_row, y_batch, y_head, y_row, z_batch, z_head, z_row, down_x, down_y, down_z,
    length, columns, rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Up to three of out [B, length, heads, WIDTH]: x [B, heads, length - 1, WIDTH] from row ``down`` on, else 0."""
    which = tl.program_id(1)
    if which == 0:
        _pad_one(
            x_ptr, of_x_ptr, x_batch, x_head, x_row, down_x, length, columns, rows, WIDTH, BLOCK_M, BLOCK_N
        )  # fmt: skip
    elif which == 1:
        if y_ptr is not None:
            _pad_one(
                y_ptr, of_y_ptr, y_batch, y_head, y_row, down_y, length, columns, rows, WIDTH, BLOCK_M, BLOCK_N
            )  # fmt: skip
    elif z_ptr is not None:
        _pad_one(
            z_ptr, of_z_ptr, z_batch, z_head, z_row, down_z, length, columns, rows, WIDTH, BLOCK_M, BLOCK_N
        )  # fmt: skip


class _Sizes(NamedTuple):
    """Blocks, their rows and columns, and what the kernel is told of sizes."""

    blocks: int
    block_m: int
    block_n: int
    numbers: tuple[int, int, int]


@functools.lru_cache(maxsize=256)
def _sizes(shape: torch.Size) -> _Sizes:
    batch, heads, rows, width = shape
    length, columns = rows + 1, heads * width
    if batch * length * columns > 2**31 - _BLOCK:
        raise ArgumentError(f"query: expected at most 2^31 - {_BLOCK} elements, got {batch * length * columns}")
    block_n = min(512, triton.next_power_of_2(columns))
    block_m = _BLOCK // block_n
    blocks = cdiv(batch * length, block_m) * cdiv(columns, block_n)
    return _Sizes(blocks, block_m, block_n, (length, columns, batch * length))


def padded(tensors: Sequence[Tensor], downs: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors [B, heads, N - 1, D], one to three of one shape and dtype, with a row of zeros each: [B, heads, N, D].

    Of each ``downs`` says where that row goes: 1 in front of the others, 0 behind them.
    """
    first = tensors[0]
    batch, heads, rows, width = shape = first.shape
    strides = (rows + 1) * heads * width, width, heads * width, 1
    outs = [first.new_empty_strided((batch, heads, rows + 1, width), strides) for _ in tensors]
    if batch * heads * width:
        sizes, rest = _sizes(shape), 3 - len(outs)
        given, moved = [], []
        for x in tensors:
            *some, last = x.stride()
            if last != 1:
                x = x.contiguous()
                some = x.stride()[:3]
            given.append(x)
            moved += some
        nothing, zeros = (None,) * rest, (0,) * rest
        launch(
            _pad_kernel, (sizes.blocks, len(outs), 1), first.device,
            (*given, *nothing, *outs, *nothing), (*moved, *zeros, *zeros, *zeros, *downs, *zeros, *sizes.numbers),
            WIDTH=width, BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, num_warps=8,
        )  # fmt: skip
    return tuple(outs)
