"""Calls as users write them, and the same of another checkout, see `bench.before`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from bench.before import Before, before
from bench.clock import Timed
from bench.harness import SHORT_SECONDS, Peer, timed, using_threads
from bench.registry import Contender, peer
from bench.sampler import PipelineCall, Sampling
from fastvq import sample


class Call(Contender):
    """A call of a user, with default arguments and numbers of threads."""

    def __init__(self, problem: Sampling | PipelineCall, run: Callable[[], list[Tensor] | Tensor]) -> None:
        super().__init__()
        self.problem, self.run = problem, run

    def warm(self) -> list[Peer]:
        with using_threads(self.problem.threads):
            self.run()
            seconds = timed(self.run) if self.problem.tuned else 0.0
        return [Peer(self.name, self.run, seconds, self.problem.threads)]


@peer("default call", name="fastvq")
def call(problem: Sampling) -> Call:
    return Call(problem, functools.partial(sample, problem.prior, problem.case.batch, **problem.inputs))


@peer("pipeline call", name="fastvq")
def pipeline_call(problem: PipelineCall) -> Call:
    def run() -> list[Tensor]:
        return list(problem.pipeline.sample(problem.case.batch, **problem.inputs).codes)

    return Call(problem, run)


class Earlier(Contender):
    """A call in the other process, with each number of threads that may suit it.

    Args:
        model: the folder of a prior, or the name of a pipeline.
        arguments: of the call.
    """

    def __init__(
        self,
        problem: Sampling | PipelineCall,
        process: Before,
        model: str,
        arguments: dict[str, Any],
        threads: Iterable[int],
    ) -> None:
        super().__init__()
        self.problem, self.process, self.model = problem, process, model
        self.arguments, self.threads = arguments, threads
        self.facts["commit"] = process.commit
        self.remarks.append(f"commit {process.commit[:8]}")

    def warm(self) -> list[Peer]:
        found = []
        for threads in self.threads:
            seconds = self._pace(threads) if self.problem.tuned else 0.0
            found.append(Peer(f"{self.name}/{threads}", functools.partial(self.run, threads), seconds, threads))
        found.sort(key=lambda form: form.expected)
        return [form for form in found if not self.problem.tuned or form.expected < 3 * found[0].expected]

    def _pace(self, threads: int) -> float:
        """Seconds that a run may take; weights are packed then."""
        batch = self.problem.case.batch
        one = self.process.sample(self.model, 1, _first(self.arguments), threads).seconds
        return batch * one if batch * one > SHORT_SECONDS else min(self.run(threads).seconds for _ in range(2))

    def run(self, threads: int) -> Timed:
        timing = self.process.sample(self.model, self.problem.case.batch, self.arguments, threads)
        codes = timing.result
        return timing if isinstance(self.problem, PipelineCall) else timing._replace(result=codes[0])


def _first(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the first sample alone, which nothing is to be added to."""
    changed: dict[str, Any] = {name: one[:1] for name, one in arguments.items() if isinstance(one, Tensor)}
    if "micro_batch" in arguments:
        changed["micro_batch"] = 1
    if arguments.get("condition") is not None:
        changed["condition"] = [codes[:1] for codes in arguments["condition"]]
    return {**arguments, **changed}


@peer("sampling", name="before")
def sampling_before(problem: Sampling) -> Earlier:
    process = before()
    arguments = {**problem.inputs, "engine": "cpu", "micro_batch": problem.case.batch}
    return Earlier(problem, process, process.path_of(problem.prior), arguments, problem.thread_counts("cpu"))


@peer("default call", name="before")
def call_before(problem: Sampling) -> Earlier:
    process = before()
    return Earlier(problem, process, process.path_of(problem.prior), problem.inputs, [problem.threads])


@peer("pipeline call", name="before")
def pipeline_before(problem: PipelineCall) -> Earlier:
    return Earlier(problem, before(), "digits", problem.inputs, [problem.threads])
