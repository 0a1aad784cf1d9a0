"""The levels of a residual quantiser one after the other: the definition, and what runs where no kernel does."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops.nearest_code import options as nearest
from fastvq.ops.nearest_code import reference
from fastvq.ops.nearest_code.backends import BACKENDS
from fastvq.ops.residual_codes.options import Codes, Options, Statistics, StatisticsOptions


class InTurn:
    """A backend that searches level by level, for x [N, D], codebooks [Q, K, D] and depths [N] or None."""

    def chosen(self, x: Tensor, codebook: Tensor) -> Any:
        """What searches in one codebook, as `fastvq.ops.nearest_code.backends` describes it."""
        return BACKENDS.select(None, x, codebook).run

    def codes(self, x: Tensor, codebooks: Tensor, depths: Tensor | None, options: Options) -> Codes:
        given, indices = nearest.Options(options.mode, False, None), []
        residual = total = None
        for level, codebook in enumerate(codebooks.split(1)):
            residual, total = _begin(x) if residual is None or total is None else (residual, total)
            found = self.chosen(residual[None], codebook).indices(residual[None], codebook, given)[0]
            residual, total = _step(residual, total, codebook[0], found, present := _present(depths, level))
            indices.append(found if present is None else torch.where(present, found, -1))
        assert total is not None
        return total, torch.stack(indices, 1)

    def statistics(self, x: Tensor, codebooks: Tensor, depths: Tensor | None, options: StatisticsOptions) -> Statistics:
        given = nearest.StatisticsOptions(options.mode, options.deterministic, False, None)
        residual, total = _begin(x)
        parts, indices = [], []
        for level, codebook in enumerate(codebooks.split(1)):
            present = _present(depths, level)
            run, mask = self.chosen(residual[None], codebook), None if present is None else present[None]
            *found, index = run.statistics(residual[None], codebook, mask, given)
            parts.append(found)
            residual, total = _step(residual, total, codebook[0], index[0], present)
            indices.append(index[0] if present is None else torch.where(present, index[0], -1))
        errors, sums, counts = (torch.cat(values) for values in zip(*parts, strict=True))
        return errors, sums, counts, total, torch.stack(indices, 1)


class Reference(InTurn):
    """The same in plain PyTorch alone."""

    def chosen(self, x: Tensor, codebook: Tensor) -> ModuleType:
        return reference


def residual_dtype(x: Tensor) -> torch.dtype:
    """What residuals are kept in: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def _begin(x: Tensor) -> tuple[Tensor, Tensor]:
    """r_0 and the sum of no codes."""
    residual = x.to(residual_dtype(x))
    return residual, torch.zeros_like(residual)


def _present(depths: Tensor | None, level: int) -> Tensor | None:
    return None if depths is None else depths > level


def _step(
    residual: Tensor, total: Tensor, codebook: Tensor, index: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    code = F.embedding(index, codebook).to(residual.dtype)
    if present is not None:
        code = torch.where(present[:, None], code, 0)
    return residual - code, total + code
