"""Finite scalar quantisation: every channel is bounded and rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq._check import require_positive_int
from fastvq.errors import ArgumentTypeError
from fastvq.models.quantizer.gradient import pass_gradient
from fastvq.models.quantizer.scalar import ScalarQuantizer

# By how much a channel's range exceeds its outermost levels, which are reached thereby.
_MARGIN = 1e-3


class FSQ(ScalarQuantizer):
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505, section 3).

    A channel of L levels is bounded to f(z) = h tanh(z + s) - o, with h = (L - 1) / 2 * (1 + 0.001), o = 1/2 for even
    and 0 for odd L, and s = atanh(o / h), so that f(0) = 0. It is rounded to the nearest integer, with straight-through
    gradient, and divided by floor(L / 2): values lie in [-1, 1]. Its digit is that integer plus floor(L / 2), and codes
    are the digits' numbers in mixed radix, the first channel's counting least. NaN stays NaN and has digit 0.

    There is no codebook: nothing collapses, and both losses are 0.

    Args:
        levels: L for each of D channels, from 3 to 1000; (8, 5, 5, 5) makes 1000 codes.
        heads, input_dim, channels_last: see :class:`fastvq.VectorQuantizer`.

    Attributes:
        levels: as given.
        num_codes: the product of ``levels``.
        code_dim: D.
    """

    def __init__(
        self, levels: Sequence[int], *, heads: int = 1, input_dim: int | None = None, channels_last: bool = False
    ) -> None:
        if not isinstance(levels, (list, tuple)) or not levels:
            raise ArgumentTypeError(f"levels: expected a list of ints, one for each channel, got {levels!r}")
        places = [1]
        for index, count in enumerate(levels):
            # With two levels the bound is never crossed; from 1001 the margin reaches another level.
            places.append(places[-1] * require_positive_int(f"levels[{index}]", count, 3, 1000))
        self.levels = tuple(levels)
        super().__init__(self.levels, places[:-1], heads=heads, input_dim=input_dim, channels_last=channels_last)

    def extra_repr(self) -> str:
        return f"{self.levels}" + (f", heads={self.heads}" if self.heads > 1 else "")

    def _quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        half_width, levels = self._levels // 2, self._levels.to(vectors.dtype)
        half, offset = (levels - 1) * (0.5 + 0.5 * _MARGIN), 0.5 - levels % 2 / 2
        bounded = torch.tanh(vectors + torch.atanh(offset / half)) * half - offset
        rounded = pass_gradient(bounded, bounded.detach().round(), "straight_through")
        digits = (rounded.detach() + half_width).nan_to_num(0).long()
        return rounded / half_width, digits

    def _values(self, digits: Tensor) -> Tensor:
        half_width = self._levels // 2
        return (digits - half_width).float() / half_width
