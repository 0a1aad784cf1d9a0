"""Everything about causal attention that is no tensor, in the order in which PyTorch's dispatcher passes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """As for `fastvq.ops.causal_attention`."""

    mask: str
    dropout: float
    backend: str | None
