"""Noticing that tensors have changed where their version counters do not say so."""

from __future__ import annotations

import torch
from torch import Tensor


def first_elements(tensor: Tensor, count: int) -> Tensor:
    """A view of up to ``count`` elements. Flattening another memory format would copy."""
    tensor = tensor.detach()
    return (tensor.reshape(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.ndim - 1)])[:count]


def gather(views: list[Tensor]) -> list[Tensor]:
    """Copies of the views, joined by device and type so that comparing takes few operations."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for view in views:
        groups.setdefault((view.device, view.dtype), []).append(view)
    return [torch.cat(group) for group in groups.values()]


def unchanged(views: list[Tensor], seen: list[Tensor]) -> bool:
    """Whether the views still hold what :func:`gather` found in them."""
    return all(map(torch.equal, gather(views), seen))
