"""A backend of nearest code from outside the package, for vectors and codes on a line."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.ops.dispatch import Backend
from fastvq.ops.nearest_code import backends, reference


class Sorted:
    """What a row of nearest code runs: ``indices`` and ``statistics``."""

    statistics = staticmethod(reference.statistics)

    @staticmethod
    def indices(x: Tensor, codebook: Tensor, options: object) -> Tensor:
        found = []
        for points, codes in zip(x[..., 0], codebook[..., 0], strict=True):
            order = codes.argsort()
            borders = (codes[order][1:] + codes[order][:-1]) / 2
            found.append(order[torch.searchsorted(borders, points.contiguous())])
        return torch.stack(found)


def why_not(x: Tensor, codebook: Tensor) -> str | None:
    return None if x.shape[-1] == 1 else f"it sorts points on a line, not in {x.shape[-1]} dimensions"


def register() -> None:
    backends.BACKENDS.add(Backend("sorted", why_not, Sorted), before="torch")
