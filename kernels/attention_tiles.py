"""What the kernels of causal attention share: blocks of rows, the mask, dropout, sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.kernels.tuning import tuned

__all__ = [
    "LN_2",
    "LOG2_E",
    "Tiles",
    "block_width",
    "check",
    "kept",
    "kept_column",
    "load_rows",
    "measured",
    "readable",
    "store_rows",
    "visible",
]

MAX_WIDTH = 256
PRECISIONS = ("ieee", "tf32")
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Block sizes of a kernel: queries, keys; warps and pipeline stages. Blocks are multiples of 16."""

    block_m: int
    block_n: int
    warps: int
    stages: int


Rule = Callable[[int, torch.dtype, int, str, bool], Tiles]
Choice = Callable[[int, int, torch.dtype, int, str, bool], Tiles]


def measured(kernel: str, candidates: tuple[Tiles, ...]) -> Callable[[Rule], Choice]:
    """Makes a rule for the wider of queries and values a function of both widths that asks the table first.

    All candidates after the one that a rule takes can run too.
    """

    def make(rule: Rule) -> Choice:
        @functools.wraps(rule)
        def tiles(
            query_width: int, value_width: int, dtype: torch.dtype, capability: int, precision: str, dropout: bool
        ) -> Tiles:
            widest = max(block_width(query_width), block_width(value_width))
            found = rule(widest, dtype, capability, precision, dropout)
            sizes = f"{dtype} {precision} w{widest}{' dropout' if dropout else ''}"
            return tuned(kernel, capability, sizes, candidates[candidates.index(found) :]) or found

        return tiles

    return make


@triton.jit
def load_rows(
    base_ptr, first, stride_n, stride_w, length,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows from ``first`` of one head, [BLOCK_N, BLOCK_W]; zeros beyond the width, and with MASKED the length."""
    offs_n, offs_w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)  # [BLOCK_N], [BLOCK_W]
    ptrs = base_ptr + tl.cast(first, tl.int64) * stride_n
    ptrs += offs_n.to(tl.int64)[:, None] * stride_n + offs_w.to(tl.int64)[None, :] * stride_w  # [BLOCK_N, BLOCK_W]
    if MASKED and WIDTH < BLOCK_W:
        return tl.load(ptrs, mask=(first + offs_n < length)[:, None] & (offs_w < WIDTH)[None, :], other=0.0)
    if MASKED:
        return tl.load(ptrs, mask=(first + offs_n < length)[:, None], other=0.0)
    if WIDTH < BLOCK_W:
        return tl.load(ptrs, mask=(offs_w < WIDTH)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(
    base_ptr, first, stride_n, stride_w, length, values,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Stores values [BLOCK_N, BLOCK_W] where `load_rows` reads."""
    offs_n, offs_w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)  # [BLOCK_N], [BLOCK_W]
    ptrs = base_ptr + tl.cast(first, tl.int64) * stride_n
    ptrs += offs_n.to(tl.int64)[:, None] * stride_n + offs_w.to(tl.int64)[None, :] * stride_w  # [BLOCK_N, BLOCK_W]
    mask = (first + offs_n < length)[:, None] & (offs_w < WIDTH)[None, :]  # [BLOCK_N, BLOCK_W]
    tl.store(ptrs, values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def kept(seed, dropout, head, first_m, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which logits dropout keeps, [BLOCK_M, BLOCK_N] from (first_m, first_n), both multiples of 16.

    Logit (head, i, j) reads word 2 (i // 8 % 2) + j // 8 % 2 of Philox at the counter (i // 16 * 8 + i % 8,
    j // 16 * 8 + j % 8, head, 0). So a call serves four logits, and they are four that one thread holds when
    the logits, or their transpose, come out of a tensor core.
    """
    offs_i = tl.cast(first_m // 2, tl.int32) + tl.arange(0, BLOCK_M // 2)  # [BLOCK_M / 2]
    offs_j = tl.cast(first_n // 2, tl.int32) + tl.arange(0, BLOCK_N // 2)  # [BLOCK_N / 2]
    zero = tl.zeros([BLOCK_M // 2, BLOCK_N // 2], tl.int32)  # [BLOCK_M / 2, BLOCK_N / 2], as are the four words
    a, b, c, d = tl.philox(seed, offs_i[:, None] + zero, offs_j[None, :] + zero, head + zero, zero)
    # [BLOCK_M / 2, BLOCK_N / 2, 2] each.
    upper = tl.join(tl.uint_to_uniform_float(a) >= dropout, tl.uint_to_uniform_float(b) >= dropout)
    lower = tl.join(tl.uint_to_uniform_float(c) >= dropout, tl.uint_to_uniform_float(d) >= dropout)
    kept = tl.reshape(tl.join(upper, lower), [BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2])
    return tl.reshape(tl.permute(kept, [0, 5, 1, 2, 4, 3]), [BLOCK_M, BLOCK_N])  # [BLOCK_M, BLOCK_N]


@triton.jit
def kept_column(seed, dropout, head, offs_m, col):
    """`kept` of one column, for int32 rows offs_m [BLOCK_M]."""
    zero = tl.zeros_like(offs_m)  # [BLOCK_M], as are the four words
    a, b, c, d = tl.philox(seed, offs_m // 16 * 8 + offs_m % 8, zero + (col // 16 * 8 + col % 8), zero + head, zero)
    right = zero + col // 8 % 2 > 0  # [BLOCK_M]
    word = tl.where(offs_m // 8 % 2 > 0, tl.where(right, d, c), tl.where(right, b, a))  # [BLOCK_M]
    return tl.uint_to_uniform_float(word) >= dropout  # [BLOCK_M]


@triton.jit
def visible(first_m, first_n, STRICT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys from ``first_n`` on the queries from ``first_m`` on attend to, [BLOCK_M, BLOCK_N]."""
    offs_m = first_m + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_n = first_n + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    return offs_n < offs_m if STRICT else offs_n <= offs_m  # [BLOCK_M, BLOCK_N]


def check(mask: str, dropout: float, precision: str, *tensors: Tensor) -> None:
    """Raises for what the kernels do not compute; ``tensors`` begin with query, key and value."""
    query, key, value = tensors[:3]
    if mask not in ("strict", "inclusive"):
        raise ArgumentError(f"mask: expected one of 'strict', 'inclusive', got {mask!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ArgumentError(f"dropout: expected a probability, got {dropout}")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if query.ndim != 4 or key.shape != query.shape or value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        raise ArgumentError(
            f"query, key, value: expected shapes [B, heads, N, D] twice and [B, heads, N, E], got {shapes}"
        )
    if max(query.shape[3], value.shape[3]) > MAX_WIDTH:
        raise ArgumentError(
            f"query, value: expected widths up to {MAX_WIDTH}, got {query.shape[3]} and {value.shape[3]}"
        )
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ArgumentTypeError(f"query: expected float32, bfloat16 or float16, got {query.dtype}")
    for tensor in tensors[1:]:
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentTypeError(
                f"query, key, value: expected one type and device, got {query.dtype} on {query.device} "
                f"and {tensor.dtype} on {tensor.device}"
            )


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where neither positions nor their entries lie side by side in memory."""
    return tensor if 1 in tensor.stride()[2:] else tensor.contiguous()


def block_width(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
