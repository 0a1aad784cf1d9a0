"""Moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of a model whose parameters follow by average <- d * average + (1 - d) * parameter.

    Early on d = min(decay, (1 + t) / (10 + t)) after t updates, so that the random initial weights do not linger for
    1 / (1 - decay) steps. Buffers, codebooks among them, are averages or constants already and are copied.

    Args:
        model: whose weights the average begins with.
        decay: d at most.

    Attributes:
        model: the average, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Follow ``model``; ``updates`` is how many updates there have been before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages: list[torch.Tensor] = list(self.model.parameters())
        parameters: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
