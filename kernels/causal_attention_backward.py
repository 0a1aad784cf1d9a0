"""Gradients of causal attention: two kernels that recompute the weights, one for queries, one for keys and values."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.kernels.attention_tiles import (
    LOG2_E,
    Tiles,
    block_width,
    check,
    kept,
    load_rows,
    measured,
    readable,
    store_rows,
    visible,
)
from fastvq.kernels.launch import hardware, on_device

__all__ = ["backward", "key_tiles", "query_tiles"]


QUERY_TILES = (
    Tiles(64, 64, 4, 2),
    Tiles(64, 64, 4, 3),
    Tiles(128, 64, 8, 2),
    Tiles(64, 32, 8, 1),
    Tiles(32, 32, 8, 1),
    Tiles(16, 16, 8, 1),
)
KEY_TILES = (
    Tiles(64, 64, 4, 2),
    Tiles(64, 64, 4, 3),
    Tiles(64, 128, 8, 2),
    Tiles(32, 128, 8, 2),
    Tiles(32, 64, 8, 2),
    Tiles(32, 32, 8, 2),
    Tiles(16, 32, 8, 1),
    Tiles(16, 16, 8, 1),
)


@measured("causal_attention_query_gradient", QUERY_TILES)
def query_tiles(widest: int, dtype: torch.dtype, capability: int, precision: str, dropout: bool) -> Tiles:
    """Those of QUERY_TILES that `_query_gradient_kernel` takes: the largest that leave no register spilled, but for
    narrow heads, of which several programs on a multiprocessor hide each other's latency.
    """
    if dtype == torch.float32:
        return Tiles(16, 16, 8, 1)
    if widest <= 32:
        return Tiles(64, 64, 4, 2)
    if widest <= 128:
        return Tiles(64, 32, 8, 1) if dropout and widest > 64 else Tiles(128, 64, 8, 2)
    return Tiles(32, 32, 8, 1)


@measured("causal_attention_key_gradient", KEY_TILES)
def key_tiles(widest: int, dtype: torch.dtype, capability: int, precision: str, dropout: bool) -> Tiles:
    """Those of KEY_TILES that `_key_value_gradient_kernel` takes, which holds two sums; chosen like `query_tiles`."""
    if dtype == torch.float32:
        return Tiles(16, 32 if widest <= 64 or precision == "tf32" else 16, 8, 1)
    if widest <= 32:
        return Tiles(64, 64, 4, 2)
    if widest <= 64:
        return Tiles(64 if capability >= 90 else 32, 128, 8, 2)
    if widest <= 128:
        return Tiles(32, 64 if dropout else 128, 8, 2)
    return Tiles(32, 32, 8, 2)


@triton.jit
def _weights_again(logits, scale, lse):
    """Weights from logits and ``lse`` in base 2, at most 1; blocks of one shape, once ``lse`` is broadcast.

    Logits that are as large as a rounding of them is may exceed lse: this product adds in another order than the
    forward pass did.
    """
    return tl.exp2(tl.minimum(logits * scale - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _query_step(
    q, grad, dq, lse, delta, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
    first, start, length, head, scale, seed, dropout, rescale,
    MASKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what one block of keys brings to the gradient of the queries, but for 1 / sqrt(D)."""
    k = load_rows(key_ptr, start, key_stride_n, key_stride_d, length, MASKED, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(
        value_ptr, start, value_stride_n, value_stride_e, length, MASKED, E, BLOCK_N, BLOCK_E
    )  # [BLOCK_N, BLOCK_E]
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        keep = kept(seed, dropout, head, first, start, BLOCK_M, BLOCK_N)  # [BLOCK_M, BLOCK_N]
        logits = tl.where(keep, logits * rescale, 0.0)
    weights = _weights_again(logits, scale, lse[:, None])  # [BLOCK_M, BLOCK_N]
    # [BLOCK_M, BLOCK_N]
    slopes = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if MASKED:
        slopes = tl.where(visible(first, start, STRICT, BLOCK_M, BLOCK_N), slopes, 0.0)
    if DROPOUT:
        slopes = tl.where(keep, slopes * rescale, 0.0)
    return tl.dot(slopes.to(k.dtype), k, dq, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]


@triton.jit(do_not_specialize=["seed"])
def _query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dquery_ptr,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    value_stride_b, value_stride_h, value_stride_n, value_stride_e,
    out_stride_b, out_stride_h, out_stride_n, out_stride_e,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_stride_e,
    dquery_stride_b, dquery_stride_h, dquery_stride_n, dquery_stride_d,
    heads, length, scale, factor, seed, dropout, rescale,
    D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, and delta [B, heads, N], which the other kernel reads."""
    blocks = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    out_ptr += b * out_stride_b + h * out_stride_h
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    offs_m = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    lse_ptrs = lse_ptr + (head.to(tl.int64) * length + offs_m)  # [BLOCK_M]
    delta_ptrs = delta_ptr + (head.to(tl.int64) * length + offs_m)  # [BLOCK_M]

    # [BLOCK_M, BLOCK_E] each.
    out = load_rows(out_ptr, first, out_stride_n, out_stride_e, length, True, E, BLOCK_M, BLOCK_E)
    grad = load_rows(grad_ptr, first, grad_stride_n, grad_stride_e, length, True, E, BLOCK_M, BLOCK_E)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)  # [BLOCK_M]
    tl.store(delta_ptrs, delta, mask=offs_m < length)
    q = load_rows(
        query_ptr, first, query_stride_n, query_stride_d, length, True, D, BLOCK_M, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    lse = tl.load(lse_ptrs, mask=offs_m < length, other=0.0) * LOG2_E  # [BLOCK_M]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [BLOCK_M, BLOCK_D]
    whole = first // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq = _query_step(
            q, grad, dq, lse, delta, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            False, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    for start in range(whole, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        dq = _query_step(
            q, grad, dq, lse, delta, key_ptr, value_ptr, key_stride_n, key_stride_d, value_stride_n, value_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            True, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    dquery_ptr += b * dquery_stride_b + h * dquery_stride_h
    store_rows(dquery_ptr, first, dquery_stride_n, dquery_stride_d, length, dq * factor, D, BLOCK_M, BLOCK_D)


@triton.jit
def _key_value_step(
    k, v, dk, dv, query_ptr, grad_ptr, lse_ptr, delta_ptr,
    query_stride_n, query_stride_d, grad_stride_n, grad_stride_e,
    first, start, length, head, scale, seed, dropout, rescale,
    MASKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries start .. start + BLOCK_M bring to the gradients of keys (but for 1 / sqrt(D)) and values."""
    offs_m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = load_rows(
        query_ptr, start, query_stride_n, query_stride_d, length, True, D, BLOCK_M, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    grad = load_rows(
        grad_ptr, start, grad_stride_n, grad_stride_e, length, True, E, BLOCK_M, BLOCK_E
    )  # [BLOCK_M, BLOCK_E]
    # Rows beyond the length get the weight 0.
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=float("inf")) * LOG2_E  # [BLOCK_M]
    delta = tl.load(delta_ptr + offs_m, mask=offs_m < length, other=0.0)  # [BLOCK_M]
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if DROPOUT:
        keep = tl.trans(kept(seed, dropout, head, start, first, BLOCK_M, BLOCK_N))  # [BLOCK_N, BLOCK_M]
        logits = tl.where(keep, logits * rescale, 0.0)
    weights = _weights_again(logits, scale, lse[None, :])  # [BLOCK_N, BLOCK_M]
    if MASKED:
        seen = tl.trans(visible(start, first, STRICT, BLOCK_M, BLOCK_N))  # [BLOCK_N, BLOCK_M]
        weights = tl.where(seen, weights, 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)  # [BLOCK_N, BLOCK_E]
    # [BLOCK_N, BLOCK_M]
    slopes = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    if DROPOUT:
        slopes = tl.where(keep, slopes * rescale, 0.0)
    dk = tl.dot(slopes.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit(do_not_specialize=["seed"])
def _key_value_gradient_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d,
    key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    value_stride_b, value_stride_h, value_stride_n, value_stride_e,
    grad_stride_b, grad_stride_h, grad_stride_n, grad_stride_e,
    dkey_stride_b, dkey_stride_h, dkey_stride_n, dkey_stride_d,
    dvalue_stride_b, dvalue_stride_h, dvalue_stride_n, dvalue_stride_e,
    heads, length, scale, factor, seed, dropout, rescale,
    D: tl.constexpr, E: tl.constexpr, STRICT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values."""
    blocks = tl.cdiv(length, BLOCK_N)
    head = tl.program_id(0) // blocks
    # The first keys are seen by the most queries.
    first = tl.program_id(0) % blocks * BLOCK_N
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    lse_ptr += head.to(tl.int64) * length
    delta_ptr += head.to(tl.int64) * length

    k = load_rows(key_ptr, first, key_stride_n, key_stride_d, length, True, D, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(
        value_ptr, first, value_stride_n, value_stride_e, length, True, E, BLOCK_N, BLOCK_E
    )  # [BLOCK_N, BLOCK_E]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)  # [BLOCK_N, BLOCK_E]
    whole = tl.cdiv(first + BLOCK_N, BLOCK_M) * BLOCK_M
    for start in range(first // BLOCK_M * BLOCK_M, tl.minimum(whole, length), BLOCK_M):
        dk, dv = _key_value_step(
            k, v, dk, dv, query_ptr, grad_ptr, lse_ptr, delta_ptr,
            query_stride_n, query_stride_d, grad_stride_n, grad_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            True, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    for start in range(whole, length, BLOCK_M):
        dk, dv = _key_value_step(
            k, v, dk, dv, query_ptr, grad_ptr, lse_ptr, delta_ptr,
            query_stride_n, query_stride_d, grad_stride_n, grad_stride_e,
            first, start, length, head, scale, seed, dropout, rescale,
            False, D, E, STRICT, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    dkey_ptr += b * dkey_stride_b + h * dkey_stride_h
    dvalue_ptr += b * dvalue_stride_b + h * dvalue_stride_h
    store_rows(dkey_ptr, first, dkey_stride_n, dkey_stride_d, length, dk * factor, D, BLOCK_N, BLOCK_D)
    store_rows(dvalue_ptr, first, dvalue_stride_n, dvalue_stride_e, length, dv, E, BLOCK_N, BLOCK_E)


@torch.no_grad()
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
    mask: str, dropout: float = 0.0, seed: int = 0, precision: str = "ieee",
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `fastvq.kernels.causal_attention.forward`, bitwise the same in every run.

    Args:
        grad: [B, heads, N, E], any strides.
        query, key, value, mask, dropout, seed, precision: as given to the forward pass.
        out, lse: what it returned.
        tiles: instead of those of `query_tiles` and `key_tiles`.

    Returns:
        Gradients of query, key and value, with the strides of ``torch.empty_like`` of each.

    A position whose entries are not finite may spoil gradients of others in the same block of the diagonal.

    Raises:
        ArgumentError, ArgumentTypeError: shapes, types or widths that the kernels do not compute.
    """
    check(mask, dropout, precision, query, key, value, out, grad)
    if grad.shape != value.shape or out.shape != value.shape:
        raise ArgumentError(
            f"grad, out: expected the shape of value, {list(value.shape)}, got {list(grad.shape)} and {list(out.shape)}"
        )
    batch, heads, length, width = query.shape
    if lse.shape != query.shape[:3] or lse.dtype != torch.float32:
        raise ArgumentError(f"lse: expected float32 {[batch, heads, length]}, got {lse.dtype} {list(lse.shape)}")
    dquery, dkey, dvalue = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if lse.numel() == 0:
        return dquery, dkey, dvalue
    grad, query, key, value, out = map(readable, (grad, query, key, value, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    value_width = value.shape[3]
    sizes = (width, value_width, query.dtype, hardware(query.device).capability, precision, dropout > 0)
    of_query, of_key = tiles or (query_tiles(*sizes), key_tiles(*sizes))
    factor = 1 / math.sqrt(width)
    numbers = (heads, length, LOG2_E.value * factor, factor, seed, dropout, 1 / (1 - dropout) if dropout < 1 else 0.0)
    flags = {
        "D": width, "E": value_width, "STRICT": mask == "strict", "DROPOUT": dropout > 0, "PRECISION": precision,
        "BLOCK_D": block_width(width), "BLOCK_E": block_width(value_width),
    }  # fmt: skip
    with on_device(query.device):
        _query_gradient_kernel[(triton.cdiv(length, of_query.block_m) * batch * heads,)](
            query, key, value, out, grad, lse, delta, dquery,
            *query.stride(), *key.stride(), *value.stride(), *out.stride(), *grad.stride(), *dquery.stride(),
            *numbers, **flags, BLOCK_M=of_query.block_m, BLOCK_N=of_query.block_n,
            num_warps=of_query.warps, num_stages=of_query.stages,
        )  # fmt: skip
        _key_value_gradient_kernel[(triton.cdiv(length, of_key.block_n) * batch * heads,)](
            query, key, value, grad, lse, delta, dkey, dvalue,
            *query.stride(), *key.stride(), *value.stride(), *grad.stride(), *dkey.stride(), *dvalue.stride(),
            *numbers, **flags, BLOCK_M=of_key.block_m, BLOCK_N=of_key.block_n,
            num_warps=of_key.warps, num_stages=of_key.stages,
        )  # fmt: skip
    return dquery, dkey, dvalue
