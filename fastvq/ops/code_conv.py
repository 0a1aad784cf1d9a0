"""Convolution of codes: look-ups in place of one-hot vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_codes, require_shape


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
