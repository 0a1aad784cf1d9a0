"""The logits of whole grids by a plan's operations, one after the other: what engines compute, at once and slowly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.sampling.plan.form import Op, Plan, Tap


def plan_logits(plan: Plan, codes: Tensor, statics: Mapping[str, Tensor]) -> Tensor:
    """Logits of grids that are known: float32 [B, K, H, W].

    Args:
        codes: int [B, H, W].
        statics: what is known beforehand by name, float32 [B or 1, C, H or 1, W or 1].
    """
    batch, height, width = codes.shape
    values: list[Tensor] = []  # [B, H, W, C]
    for op in plan.ops:
        values.append(_value(op, values, codes, statics).expand(batch, height, width, op.channels))
    return values[plan.output].permute(0, 3, 1, 2)


def _value(op: Op, values: list[Tensor], codes: Tensor, statics: Mapping[str, Tensor]) -> Tensor:
    sources = [values[source] for source in op.sources]
    match op.kind:
        case "static":
            return statics[op.variant].float().permute(0, 2, 3, 1)
        case "lookup":
            assert op.weight is not None
            assert op.bias is not None
            nothing = op.weight.shape[1]
            total: Tensor = op.bias
            for tap, table in zip(op.taps, op.weight, strict=True):
                there = shifted(codes[..., None] - nothing, tap)[..., 0] + nothing
                total = total + F.embedding(there, torch.cat([table, table.new_zeros(1, op.channels)]))
            return total
        case "affine":
            assert op.bias is not None
            total = op.bias
            for term in op.terms:
                for tap, weight in zip(term.taps, term.weight, strict=True):
                    total = total + shifted(values[term.source], tap) @ weight
            return total
        case "attention":
            return _attended(op, *sources)
    return elementwise(op, sources)


def elementwise(op: Op, sources: list[Tensor]) -> Tensor:
    """Activation, add or gate on vectors along the last axis."""
    x = sources[0]
    match op.variant:
        case "elu":
            return F.elu(x)
        case "concat_elu":
            return F.elu(torch.cat([x, -x], dim=-1))
        case "relu":
            return F.relu(x)
        case "glu":
            return F.glu(x, dim=-1)
        case "tanh":
            content, gate = x.chunk(2, dim=-1)
            return torch.tanh(content) * torch.sigmoid(gate)
    return x + sources[1]


def shifted(x: Tensor, tap: Tap) -> Tensor:
    """[B, H, W, C] whose place (r, c) is that of (r + dr, c + dc) in x, and zero outside of it."""
    (dr, dc), (height, width) = tap, x.shape[1:3]
    if abs(dr) >= height or abs(dc) >= width:
        return torch.zeros_like(x)
    inside = x[:, max(0, dr) : height + min(0, dr), max(0, dc) : width + min(0, dc)]
    return F.pad(inside, (0, 0, max(0, -dc), max(0, dc), max(0, -dr), max(0, dr)))


def _attended(op: Op, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, height, width, _ = query.shape
    q, k, v = (
        x.flatten(1, 2).unflatten(2, (op.heads, -1)).transpose(1, 2) for x in (query, key, value)
    )  # [B, heads, N, D]
    seen = torch.ones(height * width, height * width, dtype=torch.bool, device=query.device)
    seen = seen.tril(-1 if op.variant == "strict" else 0)
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, dim=3).nan_to_num(0.0)  # the first position may see nothing
    return (weights @ v).transpose(1, 2).reshape(batch, height, width, -1)
