"""Everything about the levels that is no tensor, in the order in which PyTorch's dispatcher passes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The sum of codes [N, D] and indices [N, Q].
Codes = tuple[Tensor, Tensor]
# Squared errors [Q], sums [Q, K, D], counts [Q, K], and `Codes`: the output with a gradient comes first.
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """As for `fastvq.ops.residual_codes`."""

    mode: str
    backend: str | None


class StatisticsOptions(NamedTuple):
    """As for `fastvq.ops.residual_codes_statistics`."""

    mode: str
    deterministic: bool
    backend: str | None
