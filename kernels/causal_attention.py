"""Causal attention on a GPU: online softmax forward, backward by recomputation, dropout on the logits.

A program takes a block of queries (forward, gradient of the queries) or of keys (gradients of keys and values) and goes
over the blocks of the other that the mask leaves: first those that the diagonal crosses, then those it leaves whole,
without any mask. Nothing of size N x N is stored, and no float is added atomically, so results are bitwise repeatable.

Softmax runs in base 2 on logits times log2(e) / sqrt(D). The gradient of a logit is p (dp - delta) with dp the product
of the output's gradient and the value, and delta the sum over the width of output times its gradient (Dao et al. 2022,
"FlashAttention", appendix B.4).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.kernels.attention_tiles import (
    LN_2,
    LOG2_E,
    Tiles,
    block_width,
    check,
    kept,
    kept_column,
    load_rows,
    measured,
    readable,
    store_rows,
    visible,
)
from fastvq.kernels.causal_attention_backward import backward
from fastvq.kernels.launch import hardware, on_device

__all__ = ["backward", "forward", "forward_tiles"]


FORWARD_TILES = (
    Tiles(64, 64, 4, 3),
    Tiles(128, 128, 8, 3),
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 2),
    Tiles(64, 64, 8, 2),
    Tiles(64, 32, 8, 2),
    Tiles(32, 32, 8, 1),
    Tiles(32, 16, 8, 1),
    Tiles(16, 16, 8, 1),
)


@measured("causal_attention", FORWARD_TILES)
def forward_tiles(widest: int, dtype: torch.dtype, capability: int, precision: str, dropout: bool) -> Tiles:
    """Those of FORWARD_TILES that `_forward_kernel` takes: the largest that leave no register spilled, but for narrow
    heads, of which four programs on a multiprocessor hide each other's latency.
    """
    if dtype == torch.float32:
        if widest <= 64:
            return Tiles(32, 32 if precision == "tf32" else 16, 8, 1)
        return Tiles(16, 16, 8, 1)
    if widest <= 64:
        return Tiles(64, 64, 4, 3)
    if widest <= 128:
        return Tiles(64, 32, 8, 2) if dropout else Tiles(128, 64, 8, 2)
    return Tiles(64, 64 if capability == 90 else 32, 8, 2)


@triton.jit
def _attend(
    q, acc, top, total, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
    first, start, length, head, scale, seed, dropout, rescale,
    MASKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: new sum of weighted values, running maximum (base 2) and sum of weights."""
    k = load_rows(key_ptr, start, key_stride_n, key_stride_d, length, MASKED, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        logits = tl.where(kept(seed, dropout, head, first, start, BLOCK_M, BLOCK_N), logits * rescale, 0.0)
    if MASKED:
        logits = tl.where(visible(first, start, STRICT, BLOCK_M, BLOCK_N), logits, -float("inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1) * scale)  # [BLOCK_M]
    shift = higher
    if MASKED and STRICT:
        # The first row of the block sees nothing on the diagonal.
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # [BLOCK_M]
    weights = tl.exp2(logits * scale - shift[:, None])  # [BLOCK_M, BLOCK_N]
    fade = tl.exp2(top - shift)  # [BLOCK_M]
    total = total * fade + tl.sum(weights, axis=1)  # [BLOCK_M]
    v = load_rows(
        value_ptr, start, value_stride_n, value_stride_e, length, MASKED, E, BLOCK_N, BLOCK_E
    )  # [BLOCK_N, BLOCK_E]
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)  # [BLOCK_M, BLOCK_E]
    return acc, higher, total


@triton.jit
def _attend_one_by_one(
    acc, query_ptr, key_ptr, value_ptr,
    query_stride_n, query_stride_d, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
    top, first, start, length, head, scale, seed, dropout, rescale,
    D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weighted values of keys start .. first + BLOCK_M, none of them multiplied by the weight 0 of a masked position.

    ``top`` is the maximum after these keys, as `_attend` returns it. A key is read BLOCK_K columns at a time.
    """
    offs_m, offs_e = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)  # [BLOCK_M], [BLOCK_E]
    shift = tl.where(top == -float("inf"), 0.0, top)  # [BLOCK_M]
    # All zeros, in the layout that the products need.
    acc = tl.where(acc == 0, acc, 0.0)  # [BLOCK_M, BLOCK_E]
    for n in range(start, tl.minimum(first + BLOCK_M, length)):
        logits = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
        for depth in range(0, D, BLOCK_K):
            offs_k = (depth + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
            mask_k = offs_k < D  # [BLOCK_K]
            key_ptrs = key_ptr + tl.cast(n, tl.int64) * key_stride_n + offs_k * key_stride_d  # [BLOCK_K]
            k = tl.load(key_ptrs, mask=mask_k, other=0.0)  # [BLOCK_K]
            mask = (offs_m < length)[:, None] & mask_k[None, :]  # [BLOCK_M, BLOCK_K]
            query_ptrs = query_ptr + offs_m.to(tl.int64)[:, None] * query_stride_n + offs_k[None, :] * query_stride_d
            q = tl.load(query_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            logits += tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1)  # [BLOCK_M]
        if DROPOUT:
            keep = kept_column(seed, dropout, head, offs_m, n)  # [BLOCK_M]
            logits = tl.where(keep, logits * rescale, 0.0)
        mask_e = offs_e < E  # [BLOCK_E]
        value_ptrs = value_ptr + tl.cast(n, tl.int64) * value_stride_n + offs_e.to(tl.int64) * value_stride_e
        v = tl.load(value_ptrs, mask=mask_e, other=0.0)  # [BLOCK_E]
        sees = n < offs_m if STRICT else n <= offs_m  # [BLOCK_M]
        weights = tl.exp2(logits * scale - shift)  # [BLOCK_M]
        # [BLOCK_M, BLOCK_E]
        acc = tl.where(sees[:, None], acc + weights[:, None] * v.to(tl.float32)[None, :], acc)
    return acc


@triton.jit(do_not_specialize=["seed"])
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    value_stride_b, value_stride_h, value_stride_n, value_stride_e,
    out_stride_b, out_stride_h, out_stride_n, out_stride_e,
    heads, length, scale, seed, dropout, rescale,
    D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # Programs of one head run side by side, so that its keys and values stay in cache, the longest first.
    blocks = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h

    q = load_rows(
        query_ptr, first, query_stride_n, query_stride_d, length, True, D, BLOCK_M, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # [BLOCK_M, BLOCK_E]
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    whole = first // BLOCK_N * BLOCK_N
    for start in range(whole, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        acc, top, total = _attend(
            q, acc, top, total, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            True, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    # Up to here later positions entered with weight 0, which makes NaN of a value that is not finite. Doing the
    # diagonal first leaves nothing to undo but the weighted values.
    if tl.max(tl.max((acc != acc).to(tl.int32), axis=1), axis=0) > 0:
        acc = _attend_one_by_one(
            acc, query_ptr, key_ptr, value_ptr,
            query_stride_n, query_stride_d, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
            top, first, whole, length, head, scale, seed, dropout, rescale,
            D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_E, 16,
        )  # fmt: skip
    for start in range(0, whole, BLOCK_N):
        acc, top, total = _attend(
            q, acc, top, total, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            False, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip

    offs_m = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lse_ptrs = lse_ptr + head.to(tl.int64) * length + offs_m  # [BLOCK_M]
    tl.store(lse_ptrs, (top + tl.log2(total)) * LN_2, mask=offs_m < length)
    if STRICT:
        total = tl.where(offs_m == 0, 1.0, total)  # [BLOCK_M]
    out_ptr += b * out_stride_b + h * out_stride_h
    # Rounded once: where one weight is all of the sum, a value comes out as it is but for two roundings.
    out = tl.div_rn(acc, tl.broadcast_to(total[:, None], [BLOCK_M, BLOCK_E]))  # [BLOCK_M, BLOCK_E]
    store_rows(out_ptr, first, out_stride_n, out_stride_e, length, out, E, BLOCK_M, BLOCK_E)


@torch.no_grad()
def forward(
    query: Tensor, key: Tensor, value: Tensor, *,
    mask: str, dropout: float = 0.0, seed: int = 0, precision: str = "ieee", tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as `fastvq.ops.causal_attention` defines it.

    Args:
        query, key: [B, heads, N, D]; value: [B, heads, N, E]; float32, bfloat16 or float16, any strides; D, E <= 256.
        mask: ``strict`` (position 0 gets zeros) or ``inclusive``.
        dropout: probability that a logit becomes 0; those kept are scaled by 1 / (1 - dropout).
        seed: of the dropout, any int64. A logit's fate depends on the seed, its batch entry, head and positions alone.
        precision: of products of float32: ``ieee``, or on tensor cores ``tf32``.
        tiles: instead of those of `forward_tiles`.

    Returns:
        Output [B, heads, N, E] with the strides of ``torch.empty_like(value)``, and the logarithm of the sum of
        exponentials of each position's logits, float32 [B, heads, N]: -inf where it attends to nothing.

    Outputs never depend on later positions, whatever they hold, NaN included.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, types or widths that the kernels do not compute.
    """
    check(mask, dropout, precision, query, key, value)
    batch, heads, length, width = query.shape
    out = torch.empty_like(value)
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    query, key, value = readable(query), readable(key), readable(value)
    value_width = value.shape[3]
    tiles = tiles or forward_tiles(
        width, value_width, query.dtype, hardware(query.device).capability, precision, dropout > 0
    )
    with on_device(query.device):
        _forward_kernel[(triton.cdiv(length, tiles.block_m) * batch * heads,)](
            query, key, value, out, lse, *query.stride(), *key.stride(), *value.stride(), *out.stride(),
            heads, length, LOG2_E.value / math.sqrt(width), seed, dropout, 1 / (1 - dropout) if dropout < 1 else 0.0,
            D=width, E=value_width, STRICT=mask == "strict", DROPOUT=dropout > 0, PRECISION=precision,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_width(width), BLOCK_E=block_width(value_width),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, lse
