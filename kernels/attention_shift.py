"""Moving rows of attention by one position, which turns a strict mask into the causal one that libraries know.

Memory is [B, N, heads, width] throughout, as features in channels-last memory are.
"""

from __future__ import annotations

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


@torch.no_grad()
def padded(*tensors: tuple[Tensor, int]) -> tuple[Tensor, ...]:
    """Tensors [B, heads, N - 1, D], one to three of one shape and dtype, with a row of zeros each: [B, heads, N, D].

    With each comes where that row goes: 1 in front of the others, 0 behind them.
    """
    first = tensors[0][0]
    batch, heads, rows, width = first.shape
    outs = [first.new_empty((batch, rows + 1, heads, width)) for _ in tensors]
    if outs[0].numel() == 0:
        return tuple(out.transpose(1, 2) for out in outs)
    if outs[0].numel() > 2**31 - _BLOCK:
        raise ArgumentError(f"query: expected elements to number at most 2^31 - {_BLOCK}, got {outs[0].numel()}")
    given = [(x if x.stride(3) == 1 else x.contiguous(), down) for x, down in tensors]
    rest = 3 - len(given)
    strides = [stride for x, _ in given for stride in x.stride()[:3]]
    columns = heads * width
    block_n = min(512, triton.next_power_of_2(columns))
    block_m = _BLOCK // block_n
    launch(
        _pad_kernel, (cdiv(batch * (rows + 1), block_m) * cdiv(columns, block_n), len(given), 1), first.device,
        (*[x for x, _ in given], *[None] * rest, *outs, *[None] * rest),
        (
            *strides, *[0] * 3 * rest, *[down for _, down in given], *[0] * rest,
            rows + 1, columns, batch * (rows + 1),
        ),
        WIDTH=width, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return tuple(out.transpose(1, 2) for out in outs)
