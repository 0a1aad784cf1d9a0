"""Convolution of codes: look-ups in place of one-hot vectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_codes, require_floating, require_shape
from fastvq._nvtx import annotate
from fastvq.ops.dispatch import in_forward_mode, runs_directly


@annotate("code_conv2d")
def code_conv2d(codes: Tensor, table: Tensor, taps: Sequence[tuple[int, int]], bias: Tensor | None = None) -> Tensor:
    """Convolution of one-hot codes as a sum of look-ups: nothing one-hot is ever formed.

    Args:
        codes: integers [B, H, W] in 0..K-1.
        table: [T, K, C], one row of C features for each tap and code.
        taps: T pairs (row offset, column offset) relative to the current position; taps outside the grid add nothing.
        bias: [C] or None.

    Returns:
        [B, C, H, W]: the sum over t of table[t, codes[b, r + taps[t][0], c + taps[t][1]]].

    Raises:
        ArgumentError, ArgumentTypeError: shapes, dtypes or (on the CPU) codes that do not fit.
    """
    require_floating("table", table)
    require_shape("table", table, [len(taps), "K", "C"])
    num_codes, channels = table.shape[1:]
    codes = require_codes("codes", codes, ["B", "H", "W"], num_codes)
    batch, height, width = codes.shape
    if codes.is_cpu and codes.numel() and runs_directly(codes, table, optional=(bias,)):
        sources, firsts, starts = _bags(height, width, num_codes, tuple((r, c) for r, c in taps))
        if len(sources):
            rows = codes.reshape(batch, -1).index_select(1, sources).add_(firsts)
            if batch > 1:
                starts = (torch.arange(0, rows.numel(), len(sources))[:, None] + starts).flatten()
            out = F.embedding_bag(rows.flatten(), table.reshape(-1, channels), starts, mode="sum")
            return _image(out, bias, batch, height, width)
    # Compilers trace no look-up whose size depends on the geometry: what is outside the grid reads a row of zeros.
    top, left = max(0, -min(r for r, _ in taps)), max(0, -min(c for _, c in taps))
    bottom, right = max(0, *(r for r, _ in taps)), max(0, *(c for _, c in taps))
    padded = F.pad(codes, (left, right, top, bottom), value=-1)
    shifted = torch.stack([padded[:, top + r : top + r + height, left + c : left + c + width] for r, c in taps], dim=-1)
    offsets = torch.arange(len(taps), device=codes.device) * num_codes
    nothing = len(taps) * num_codes
    rows = torch.where(shifted < 0, nothing, shifted + offsets).reshape(-1, len(taps))
    flat = torch.cat([table.reshape(nothing, channels), table.new_zeros(1, channels)])
    if in_forward_mode():
        # Bags have no derivative there.
        found = F.embedding(rows, flat, padding_idx=nothing).sum(1)
    else:
        found = F.embedding_bag(rows, flat, mode="sum", padding_idx=nothing)
    return _image(found, bias, batch, height, width)


def _image(rows: Tensor, bias: Tensor | None, batch: int, height: int, width: int) -> Tensor:
    """[B, C, H, W] from [B * H * W, C]."""
    rows = rows if bias is None else rows + bias
    return rows.reshape(batch, height, width, rows.shape[-1]).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
def _bags(height: int, width: int, num_codes: int, taps: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the positions of a grid look up, one position after the other, without what lies outside the grid.

    Returns:
        The position that each look-up reads, the first row of its tap in the table, and where each position begins.
    """
    # Tensors of inference mode could not be used outside it later.
    with torch.inference_mode(False):
        offsets = torch.tensor(taps, device="cpu")
        row = torch.arange(height, device="cpu")[:, None, None] + offsets[:, 0]  # [H, 1, T]
        column = torch.arange(width, device="cpu")[:, None] + offsets[:, 1]  # [W, T]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        firsts = (torch.arange(len(taps), device="cpu") * num_codes).expand_as(inside)
        counts = inside.sum(-1).flatten()
        return (row * width + column)[inside], firsts[inside], counts.cumsum(0) - counts
