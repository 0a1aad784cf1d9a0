"""Causal operators over a grid of codes in raster order: masked convolution, code look-up, attention.

Position (r, c) may depend on rows above r and, on its own row, on columns left of c (*strict*) or up to and including c
(*inclusive*).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_choice, require_codes, require_shape
from fastvq.errors import ArgumentError

Mask = Literal["strict", "inclusive"]
Form = Literal["rows", "symmetric"]
MASKS = ("strict", "inclusive")
FORMS = ("rows", "symmetric")


def causal_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Mask = "strict", form: Form = "rows"
) -> Tensor:
    """Convolution that reads only positions before the current one in raster order.

    Args:
        x: features [B, C, H, W].
        weight: kernel [O, C, k, k]. Entries behind the mask never reach the output and get zero gradient.
        bias: [O] or None.
        mask: ``strict`` leaves the current position out, ``inclusive`` reads it.
        form: ``rows`` reads k rows ending at the current one (van den Oord et al. 2016, PixelSNAIL ports);
            ``symmetric`` is the usual kernel centred on the current position, of which the lower half is masked.
            Columns reach k // 2 to the left and k - 1 - k // 2 to the right in both.

    Returns:
        [B, O, H, W].

    Only valid taps are multiplied: the rows above and the current row are two convolutions, so that neither a NaN in a
    masked weight nor one in a later position can leak.
    """
    require_choice("mask", mask, MASKS)
    require_choice("form", form, FORMS)
    require_shape("x", x, ["B", "C", "H", "W"])
    require_shape("weight", weight, ["O", x.shape[1], "k", weight.shape[-1]])
    k = weight.shape[-1]
    if weight.shape[2] != k:
        raise ArgumentError(f"weight: expected a square kernel, got {list(weight.shape)}")
    above = k - 1 if form == "rows" else k // 2
    left, right = k // 2, k - 1 - k // 2
    height, width = x.shape[2:]
    taps = left + (mask == "inclusive")
    out = None
    if taps:
        current = F.pad(x, (left, 0)) if mask == "inclusive" else F.pad(x, (left, 0))[..., : width + left - 1]
        out = F.conv2d(current, weight[:, :, above : above + 1, :taps], bias)
    if above and height > 1:
        rows_above = F.pad(x[:, :, :-1], (left, right, above, 0))
        # The output of row r comes from rows r - above .. r - 1, so row 0 reads padding alone and is left at zero.
        upper = F.conv2d(rows_above[:, :, 1:], weight[:, :, :above])
        upper = F.pad(upper, (0, 0, 1, 0))
        out = upper if out is None else out + upper
        if not taps and bias is not None:
            out = out + bias[:, None, None]
    if out is None:
        out = x.new_zeros(x.shape[0], weight.shape[0], height, width)
        out = out if bias is None else out + bias[:, None, None]
    return out


def code_conv2d(codes: Tensor, table: Tensor, taps: Sequence[tuple[int, int]], bias: Tensor | None = None) -> Tensor:
    """Convolution of one-hot codes as a sum of look-ups: nothing one-hot is ever formed.

    Args:
        codes: integers [B, H, W] in 0..K-1.
        table: [T, K, C], one row of C features for each tap and code.
        taps: T pairs (row offset, column offset) relative to the current position; taps outside the grid add nothing.
        bias: [C] or None.

    Returns:
        [B, C, H, W]: the sum over t of table[t, codes[b, r + taps[t][0], c + taps[t][1]]].
    """
    require_shape("table", table, [len(taps), "K", "C"])
    num_codes, channels = table.shape[1:]
    codes = require_codes("codes", codes, ["B", "H", "W"], num_codes)
    batch, height, width = codes.shape
    top, left = max(0, -min(r for r, _ in taps)), max(0, -min(c for _, c in taps))
    bottom, right = max(0, *(r for r, _ in taps)), max(0, *(c for _, c in taps))
    padded = F.pad(codes, (left, right, top, bottom), value=-1)
    shifted = torch.stack([padded[:, top + r : top + r + height, left + c : left + c + width] for r, c in taps], dim=-1)
    offsets = torch.arange(len(taps), device=codes.device) * num_codes
    nothing = len(taps) * num_codes
    rows = torch.where(shifted < 0, nothing, shifted + offsets).reshape(-1, len(taps))
    flat = torch.cat([table.reshape(nothing, channels), table.new_zeros(1, channels)])
    out = F.embedding_bag(rows, flat, mode="sum", padding_idx=nothing)
    out = out if bias is None else out + bias
    return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Mask = "strict", dropout: float = 0.0
) -> Tensor:
    """Causal softmax attention over positions in raster order.

    Args:
        query, key: [B, heads, N, D]; value: [B, heads, N, E].
        mask: ``strict`` lets position i attend to positions before i, and position 0 gets zeros; ``inclusive`` lets it
            attend to itself too.
        dropout: probability of dropping an entry of the attention logits (Razavi et al. 2019, section 3.2); survivors
            are scaled by 1 / (1 - dropout). 0 when not training.

    Returns:
        [B, heads, N, E]; logits are scaled by 1 / sqrt(D).
    """
    require_choice("mask", mask, MASKS)
    require_shape("query", query, ["B", "heads", "N", "D"])
    require_shape("key", key, query.shape)
    require_shape("value", value, [*query.shape[:3], "E"])
    if query.shape[2] == 0:
        return value
    if mask == "strict":
        # Shifting keys by one turns the strict mask into the inclusive one, without a fully masked row.
        rest = causal_attention(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], mask="inclusive", dropout=dropout)
        return F.pad(rest, (0, 0, 1, 0))
    if dropout == 0.0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    logits = F.dropout(logits, dropout)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(later, float("-inf")).softmax(-1) @ value
