"""What those who quantise residuals level by level share: data, codebooks that start anew, and the check in float64."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.cases import ResidualCase
from bench.harness import Check, Peer, Work, timed
from bench.machine import CPU_FLOAT32, GPU_UNITS
from bench.nearest_code import GAP, U

_INPUTS = 4


@registry.problem("residual quantiser")
class Residuals(registry.Problem):
    """Vectors x [N, D] that runs take in turn, and codebooks [Q, K, D] whose levels fit what the ones before leave."""

    legend = (
        "residual quantiser: training forward of Q levels for N vectors that need a gradient: codes, losses, EMA",
        "updates. The floor is 2 N K D Q operations. Check, in float64: no level's code is farther from what the",
        "levels before it left than the nearest one by more than 16 u (|r| + |c|)^2 and what rounding adds.",
    )
    case: ResidualCase

    def __init__(self, case: ResidualCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        generator = torch.Generator(case.device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=case.device)

        self.inputs = [normal(case.batch, case.code_dim).requires_grad_() for _ in range(_INPUTS)]
        scales = 0.7 ** torch.arange(case.levels, device=case.device)
        self.codebooks = normal(case.levels, case.num_codes, case.code_dim) * scales[:, None, None]
        flops = 2.0 * case.batch * case.num_codes * case.code_dim * case.levels
        self.work = [Work("products", flops, unit=CPU_FLOAT32 if case.device == "cpu" else "cuda tf32")]
        self.facts = {"shape": [case.batch, case.num_codes, case.code_dim, case.levels], "device": case.device}

    def measure_ceilings(self) -> None:
        if self.case.device == "cpu":
            self.ceilings.measure_gemm()
        else:
            for unit in GPU_UNITS:
                self.ceilings.measure_gpu(unit, 8192, 8192, 8192)

    @torch.no_grad()
    def check(self, contender: Quantiser, output: Any) -> Check:
        """Of the codes [N, Q] of the last run."""
        codes: Tensor = output
        books, residual = self.codebooks.double(), contender.x.detach().double()
        longest = residual.norm(dim=1)
        worst = wrong = 0.0
        for level, book in enumerate(books):
            distances = torch.cdist(residual, book).square()
            least, nearest = distances.min(1)
            chosen = book[codes[:, level]]
            gap = (residual - chosen).square().sum(1) - least
            ends = chosen.norm(dim=1), book[nearest].norm(dim=1)
            bound = GAP * U * (residual.norm(dim=1) + torch.maximum(*ends)).square()
            # Each level before it has rounded the residual once, which moves two distances apart by 2 e.(c' - c).
            bound += 2 * level * U * longest * (ends[0] + ends[1])
            worst = max(worst, float((gap / bound).max()))
            wrong += float((codes[:, level] != nearest).sum())
            residual = residual - chosen
            longest = torch.maximum(longest, residual.norm(dim=1))
        facts = {"differ": wrong, "worst_of_bound": worst}
        return Check(worst <= 1, f"{wrong:.0f} of {codes.numel()} codes differ, at {worst:.2g} of the bound", facts)


class Quantiser(registry.Contender):
    """One who quantises a batch per run, from the same codebooks each time.

    Attributes:
        x: what the last run worked on.
    """

    def __init__(self, problem: Residuals) -> None:
        super().__init__()
        self.problem, self.case = problem, problem.case
        self.x = problem.inputs[0]
        self._next = 0

    def warm(self) -> list[Peer]:
        device, expected = self.case.device, 0.0
        for _ in range(2 if self.problem.tuned else 1):
            self.prepare()
            expected = timed(self.run, device=device)
        return [Peer(self.name, self.run, expected, self.problem.threads, self.prepare, device)]

    @torch.no_grad()
    def prepare(self) -> None:
        """Take the next input and start from the first codebooks again."""
        self.x = self.problem.inputs[self._next % len(self.problem.inputs)]
        self._next += 1
        for level, book in enumerate(self.problem.codebooks):
            size, total, codes = self.buffers(level)
            size.fill_(1)
            total.copy_(book)
            codes.copy_(book)

    @abstractmethod
    def run(self) -> Tensor:
        """Codes [N, Q] of the input taken last; moves the codebooks."""

    @abstractmethod
    def buffers(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a level: sizes of clusters [K], their sums and the codes, both [K, D]."""
