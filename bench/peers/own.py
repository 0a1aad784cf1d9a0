"""A prior of another project: its own sampler, and ours on the same module."""

from __future__ import annotations

from torch import Tensor

import fastvq
from bench.harness import Check, Entry, Peer, timed
from bench.own import OwnPrior
from bench.registry import Contender, peer


@peer("own prior", name="fastvq")
class Traced(Contender):
    """The public call, which traces the module the first time."""

    def __init__(self, problem: OwnPrior) -> None:
        super().__init__()
        self.problem = problem

    def warm(self) -> list[Peer]:
        self.facts["first_call_seconds"] = timed(self.run)
        expected = timed(self.run) if self.problem.tuned else 0.0
        return [Peer(self.name, self.run, expected, self.problem.threads)]

    def run(self) -> Tensor:
        case = self.problem.case
        return fastvq.sample(self.problem.module, case.batch, shape=case.shape, num_codes=case.num_codes, seed=0)


@peer("own prior", name="its own sampler")
class Naive(Contender):
    def __init__(self, problem: OwnPrior) -> None:
        super().__init__()
        self.problem = problem

    def warm(self) -> Entry:
        how = "extrapolated from some positions, which all cost the same"
        seconds = self.problem.naive_seconds()
        return Entry(self.name, [seconds], Check(True, "the reference"), extrapolated=how)
