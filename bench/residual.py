"""What those share who quantise residuals level by level: data, a run's course, and the check against float64."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.cases import ResidualCase
from bench.harness import Check, Peer, Work, timed
from bench.machine import CPU_FLOAT32, GPU_UNITS, Ceilings
from bench.nearest_code import AVERAGES_ERROR, GAP, Averages, U, averages_error

_CHECKED_ROWS = 2048
_INPUTS = 4


@registry.problem("residual quantiser")
class Residual(registry.Problem):
    """A case's data, made once for all: different x [N, D], which runs take in turn, and codebooks [Q, K, D]."""

    legend = (
        "residual quantiser: batch is the number N of vectors; the floor is 2 N K D Q operations, nothing else.",
        "training: forward of the module for vectors that need a gradient: codes of all levels, the sum of their",
        "vectors, commitment losses, EMA updates. encode: the codes alone. Check as for nearest code, level by level,",
        "for the residuals that the codes found before leave in float32. All threads.",
    )
    case: ResidualCase

    def __init__(self, case: ResidualCase, *, tuned: bool = True, ceilings: Ceilings | None = None) -> None:
        super().__init__(case, tuned=tuned, ceilings=ceilings)
        self.inputs, self.codebooks = case.inputs(_INPUTS)
        for x in self.inputs:
            x.requires_grad_(case.what == "training")
        unit = CPU_FLOAT32 if case.device == "cpu" else "cuda tf32"
        self.work = [Work("products of vectors and codes of all levels", case.flops, unit=unit)]
        self.facts = {"shape": [case.batch, case.num_codes, case.code_dim, case.levels], "what": case.what}
        self.facts |= {"device": case.device}

    def measure_ceilings(self) -> None:
        case = self.case
        if case.device == "cpu":
            self.ceilings.measure_gemm()
            self.ceilings.measure_tile(1024, case.code_dim, min(case.num_codes, 1024))
            return
        for unit in GPU_UNITS:
            self.ceilings.measure_gpu(unit, case.batch, case.code_dim, case.num_codes)

    @torch.no_grad()
    def check(self, contender: Contender, output: Any) -> Check:
        """Is every level's code as near as the nearest, up to rounding, and does every average hold what it should?"""
        indices: Tensor = output
        x, case = contender.x.detach(), self.case
        expected = [case.batch, case.levels]
        if list(indices.shape) != expected or not bool(((indices >= 0) & (indices < case.num_codes)).all()):
            return Check(False, f"indices of shape {list(indices.shape)}, not {expected}, or beyond the codebooks")
        rows = torch.randperm(case.batch, generator=torch.Generator().manual_seed(2))[:_CHECKED_ROWS]
        residual, codes, averages = x.float().cpu(), indices.cpu(), contender.averages()
        gap, error = 0.0, 0.0
        for level, codebook in enumerate(self.codebooks.cpu()):
            gap = max(gap, worst_gap(residual[rows], codebook, codes[rows, level]))
            if averages is not None:
                error = max(error, averages_error(averages[level], residual, codebook, codes[:, level]))
            residual = residual - codebook[codes[:, level]]
        summary = f"{len(rows)} vectors, farther by at most {gap:.2g} u"
        if averages is not None:
            summary += f", averages within {error:.1e}"
        facts = {"rows": len(rows), "worst_gap": gap, "averages_error": error}
        return Check(gap <= GAP and error <= AVERAGES_ERROR, summary, facts)


def worst_gap(x: Tensor, codebook: Tensor, indices: Tensor) -> float:
    """How much farther a chosen code is than the nearest at most, in units of u (|x| + |c|)^2, c the longer of both."""
    x, codebook = x.double(), codebook.double()
    least, nearest = torch.addmm(codebook.square().sum(1) / 2, x, codebook.T, alpha=-1).min(1)
    chosen, other = codebook[indices], codebook[nearest]
    scores = ((chosen / 2 - x) * chosen).sum(1)
    longer = torch.maximum(chosen.norm(dim=1), other.norm(dim=1))
    return max(0.0, float((2 * (scores - least) / (U * (x.norm(dim=1) + longer).square())).max()))


class Contender(registry.Contender):
    """Something that does a case's work, one input per run; ``x`` is what the last run worked on."""

    def __init__(self, problem: Residual) -> None:
        super().__init__()
        self.problem, self.case = problem, problem.case
        self.x = problem.inputs[0]
        self._next = 0

    def warm(self) -> list[Peer]:
        expected = 0.0
        if self.problem.tuned:
            self.prepare()
            expected = min(timed(self.run, device=self.case.device) for _ in range(2))
        return [Peer(self.name, self.run, expected, self.problem.threads, self.prepare, self.case.device)]

    def prepare(self) -> None:
        """Take the next input and start from the first codebooks again."""
        self.x = self.problem.inputs[self._next % len(self.problem.inputs)]
        self._next += 1
        for one, codebook in zip(self.buffers(), self.problem.codebooks, strict=True):
            one.reset(codebook)

    def averages(self) -> Sequence[Averages] | None:
        """Of every level after the last run; None where nothing moves."""
        return self.buffers() if self.case.what == "training" else None

    @abstractmethod
    def buffers(self) -> Sequence[Averages]:
        """Of every level."""

    @abstractmethod
    def run(self) -> Tensor:
        """Codes [N, Q] of the input taken last."""
