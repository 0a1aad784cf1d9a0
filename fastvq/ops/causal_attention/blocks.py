"""Causal attention in plain PyTorch, block by block, where PyTorch's own operator does not serve.

Blocks of queries meet all keys that they may see, one block after the other, and the backward pass works logits out
again: memory does not grow with N^2, and nothing behind a block's diagonal is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvq.ops.causal_attention.options import Gradients, Options

# Queries of a block: few enough that what lies behind the diagonal is little, enough for a matrix product.
_ROWS = 128
# Logits that exist at a time: on a CPU those of a block should stay in a core's cache.
_LOGITS = {"cpu": 1 << 18}
_LOGITS_ELSEWHERE = 1 << 26


def forward(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Output [B, heads, N, E] and the logarithm of each position's sum of exponentials, [B, heads, N]."""
    out = torch.empty_like(value)
    lse = query.new_empty(query.shape[:3], dtype=wide_dtype(query))
    for tile in _tiles(query, options.mask, options.dropout, 0 if seed is None else int(seed)):
        logits = tile.logits(query, key)
        total = logits.logsumexp(-1, keepdim=True)
        # Position 0 of a strict mask sees nothing: its sum is 0, and so should its weights be.
        weights = logits.sub_(total.masked_fill(total.isneginf(), 0)).exp_()
        out[tile.queries] = (weights @ _wide(value[tile.keys])).to(out.dtype)
        lse[tile.queries] = total.squeeze(-1)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    options: Options,
) -> Gradients:
    """Gradients of query, key and value (Dao et al. 2022, appendix B.4)."""
    dtype = wide_dtype(query)
    of_query = torch.empty_like(query)
    of_key, of_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
    for tile in _tiles(query, options.mask, options.dropout, 0 if seed is None else int(seed)):
        logits = tile.logits(query, key)
        total = lse[tile.queries].unsqueeze(-1)
        weights = logits.sub_(total.masked_fill(total.isneginf(), 0)).exp_()
        upstream = _wide(grad[tile.queries])
        of_value[tile.keys] += weights.transpose(-2, -1) @ upstream
        delta = (upstream * out[tile.queries]).sum(-1, keepdim=True)
        slopes = upstream @ _wide(value[tile.keys]).transpose(-2, -1)
        slopes = slopes.sub_(delta).mul_(weights).mul_(tile.scale)
        if tile.kept is not None:
            slopes *= tile.kept
        of_query[tile.queries] = (slopes @ _wide(key[tile.keys])).to(query.dtype)
        of_key[tile.keys] += slopes.transpose(-2, -1) @ _wide(query[tile.queries])
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums are computed in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class _Tile:
    """A block of queries of some heads of some samples, and all keys that one of them may see."""

    def __init__(self, batch: slice, heads: slice, first: int, last: int, shift: int, scale: float) -> None:
        self.queries = batch, heads, slice(first, last)
        self.keys = batch, heads, slice(0, last - shift)
        self.first, self.shift, self.scale = first, shift, scale
        self.kept: Tensor | None = None

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        q, k = query[self.queries], key[self.keys]
        logits = (_wide(q) * self.scale) @ _wide(k).transpose(-2, -1)
        if self.kept is not None:
            logits *= self.kept
        # Only the last columns, as many as there are rows, are crossed by the diagonal.
        rows, columns = logits.shape[-2:]
        start = max(0, self.first - self.shift)
        row = torch.arange(rows, device=logits.device)[:, None] + self.first - self.shift
        later = torch.arange(start, columns, device=logits.device) > row
        logits[..., start:].masked_fill_(later, -math.inf)
        return logits


def _tiles(query: Tensor, mask: str, dropout: float, seed: int) -> Iterator[_Tile]:
    """In an order, and with random numbers, that depend on the shape and the seed alone."""
    batch, heads, length, width = query.shape
    generator = torch.Generator(query.device).manual_seed(seed) if dropout else None
    budget = _LOGITS.get(query.device.type, _LOGITS_ELSEWHERE)
    rows = max(1, min(_ROWS, length))
    some_heads = max(1, min(heads, budget // max(1, rows * length)))
    some = max(1, budget // max(1, rows * length * heads)) if some_heads == heads else 1
    for b in range(0, batch, some):
        for h in range(0, heads, some_heads):
            for first in range(0, length, rows):
                part = slice(b, min(b + some, batch)), slice(h, min(h + some_heads, heads))
                tile = _Tile(*part, first, min(first + rows, length), int(mask == "strict"), width**-0.5)
                if generator is not None:
                    sizes = [s.stop - s.start for s in (*tile.queries, tile.keys[2])]
                    kept = torch.empty(sizes, dtype=wide_dtype(query), device=query.device)
                    tile.kept = kept.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
                yield tile


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))
