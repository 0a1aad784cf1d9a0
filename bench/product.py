"""What a row takes of the rows above it: what its contenders share, and how they are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.cases import ProductCase
from bench.harness import Check, Work

ROWS, TAPS = 2, 5
# Float32 sums of thousands of terms, relative to the largest output.
_ERROR = 1e-4


@registry.problem("row product")
class RowProduct(registry.Problem):
    """Features x [B, 2, W + 4, C], channels last as the sampler keeps them, and weights [2, 5, C, N]."""

    legend = (
        "row product: of windows of the rows above with weights packed beforehand; ours sums in one fixed order.",
        "conv2d takes the quickest of its memory layouts, and weights reordered beforehand.",
    )
    case: ProductCase

    def __init__(self, case: ProductCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        generator = torch.Generator().manual_seed(0)
        depth = ROWS * TAPS * case.channels
        self.x = torch.randn(case.batch, ROWS, case.width + TAPS - 1, case.channels, generator=generator)
        self.weight = torch.randn(ROWS, TAPS, case.channels, case.columns, generator=generator) / depth**0.5
        self.work = [Work("the product", 2.0 * case.batch * case.width * depth * case.columns)]
        self._exact = _windows(self.x.double()) @ self.weight.double().flatten(0, 2)

    def check(self, contender: registry.Contender, output: Tensor) -> Check:
        """Of [B, W, N]."""
        error = float((output.double() - self._exact).abs().max() / self._exact.abs().max())
        return Check(error <= _ERROR, f"relative error {error:.1e}", {"error": error})


def _windows(x: Tensor) -> Tensor:
    """[B, W, 2 * 5 * C]."""
    return x.unfold(2, TAPS, 1).permute(0, 2, 1, 4, 3).flatten(2)
