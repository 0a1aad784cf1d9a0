"""Everything about the search that is no tensor, in the order in which PyTorch's dispatcher passes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Squared error [H], sums [H, K, D], counts [H, K], indices [H, N]: the output with a gradient comes first.
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """As for `fastvq.ops.nearest_code`."""

    mode: str
    check_finite: bool
    backend: str | None


class StatisticsOptions(NamedTuple):
    """As for `fastvq.ops.nearest_code_statistics`."""

    mode: str
    deterministic: bool
    check_finite: bool
    backend: str | None
