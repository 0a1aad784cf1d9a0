"""Everything about a masked convolution that is no tensor, in the order in which PyTorch's dispatcher passes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of input, weight, bias and, behind a gate, the convolution's result; empty or None for what was not asked for.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class GradientOptions(NamedTuple):
    """Of the gradients of input, weight and bias; that of the bias comes with the weight's."""

    mask: str
    form: str
    activation: str | None
    needs_input: bool
    needs_weight: bool
    backend: str | None
    dtype: torch.dtype | None = None


class Options(NamedTuple):
    """As for `fastvq.ops.fused_causal_conv2d`; ``keep`` asks for what the gate is applied to as well.

    Tensors are multiplied in ``dtype``, if it is not None: autocast's, where ``fused`` reads them as they are.
    """

    mask: str
    form: str
    activation: str | None
    gate: bool
    keep: bool
    backend: str | None
    dtype: torch.dtype | None = None

    def gradients(self, needs_input: bool, needs_weight: bool) -> GradientOptions:
        """Of the gradients of this convolution."""
        return GradientOptions(
            self.mask, self.form, self.activation, needs_input, needs_weight, self.backend, self.dtype
        )
