"""A benchmark's peer and a case from outside, as a plugin of pytest: ``-p peer``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import CASES, nearest_code_case
from bench.nearest_code import NearestCode, Search
from bench.registry import peer

CASES.append(nearest_code_case(300, 20, 6, "forward"))


@peer("nearest code", name="toy")
def toy(problem: NearestCode) -> Search:
    """By the definition, one vector after the other."""

    def find(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.stack([(codebook - row).square().sum(1).argmin() for row in x])

    return Search(problem, {"row by row": find})


@peer("nearest code", name="wrong toy", takes=lambda case: case.batch == 300)
def wrong(problem: NearestCode) -> Search:
    return Search(problem, {"": lambda x, codebook: torch.zeros(len(x), dtype=torch.int64)})
