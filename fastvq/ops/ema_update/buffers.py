"""What compiled backends ask of the tensors that they move."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(counts: Tensor, *floats: Tensor) -> str | None:
    """Why compiled code cannot move these, or None when it can; ``floats`` begin with the sums."""
    if counts.dtype.is_floating_point and counts.dtype != torch.float32:
        return f"it takes integer or float32 counts, not {counts.dtype}"
    for tensor in floats:
        if tensor.dtype != torch.float32:
            return f"it takes float32, not {tensor.dtype}"
    if not all(buffer.is_contiguous() for buffer in floats[1:]):
        return "it moves contiguous buffers"
    return None


def tell_autograd(*moved: Tensor) -> None:
    """They were written behind autograd's back: whoever has saved one for a backward pass must be told."""
    if not moved[0].is_inference():
        torch.autograd.graph.increment_version(moved)
