"""The engines that sample in the benchmark, each through the public call."""

from __future__ import annotations

import copy
import functools

from torch import Tensor

from bench.cases import FEW_BATCHES, SamplerCase
from bench.engines import fill_rows, row_phase_seconds
from bench.harness import Entry, Peer, using_threads
from bench.registry import Contender, LeftOutError, peer
from bench.sampler import Pace, Sampling, naive_pace, torch_steps
from fastvq import _engine, sample
from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions

_MOST_PHASE_SECONDS = 30.0


class Engine(Contender):
    """An engine with each number of threads that may suit it; only slow ones are extrapolated."""

    def __init__(self, problem: Sampling, engine: str, *, bfloat16: bool = False) -> None:
        super().__init__()
        self.problem, self.engine, self.exact = problem, engine, not bfloat16
        self.options = EngineOptions(precision="bfloat16" if bfloat16 else "float32")
        self.priors: dict[str, Prior] = {}

    def warm(self) -> list[Peer] | Entry:
        problem, found = self.problem, []
        for threads in problem.thread_counts(self.engine):
            # An engine keeps weights packed for one setting only.
            own = self.engine == "cpu" and (threads == 1 or not self.exact)
            prior = copy.deepcopy(problem.prior) if own else problem.prior
            seconds = self.pace(prior, threads) if problem.tuned else 0.0
            run = functools.partial(self.run, prior)
            self.priors[f"{self.name}/{threads}"] = prior
            found.append(Peer(f"{self.name}/{threads}", run, seconds, threads))
        # The quickest first: it decides whether the engine can be measured in full.
        found.sort(key=lambda form: form.expected)
        if found[0].expected > problem.case.full_seconds:
            entry = self.extrapolated(found[0].threads)
            if entry is not None:
                return entry
        return [form for form in found if not problem.tuned or form.expected < 3 * found[0].expected]

    def pace(self, prior: Prior, threads: int) -> float:
        """Seconds that all rows would take at the pace of the third."""
        with using_threads(threads):
            for _ in range(2):  # the first packs weights and sets up kernels
                ticks = fill_rows(self.engine, prior, self.problem.request, 3, self.options)
        return (ticks[-1] - ticks[-2]) * prior.config.shape[0]

    def extrapolated(self, threads: int) -> Entry | None:
        """From a part of the work, for engines that can do one."""
        return None

    def run(self, prior: Prior) -> Tensor:
        """The public call."""
        batch = self.problem.case.batch
        precision = self.options.precision
        return sample(prior, batch, **self.problem.inputs, engine=self.engine, micro_batch=batch, precision=precision)

    def finish(self, entry: Entry, chosen: Peer) -> None:
        """Once more, for what of the time goes into whole rows; not where that would take minutes."""
        if chosen.expected < _MOST_PHASE_SECONDS:
            with using_threads(chosen.threads):
                spent = row_phase_seconds(self.engine, self.priors[chosen.name], self.problem.request, self.options)
            if spent:
                entry.facts["row_phase_seconds"] = [spent]


def _few(case: SamplerCase) -> bool:
    return case.batch in FEW_BATCHES


@peer("sampling", name="naive", takes=_few)
class Naive(Engine):
    def __init__(self, problem: Sampling) -> None:
        super().__init__(problem, "naive")
        self.paces: dict[int, Pace] = {}

    def pace(self, prior: Prior, threads: int) -> float:
        problem = self.problem
        with using_threads(threads):
            self.paces[threads] = naive_pace(problem.case, prior, problem.request, threads)
        return self.paces[threads].seconds

    def extrapolated(self, threads: int) -> Entry:
        return self.paces[threads].entry()


@peer("sampling", name="torch", takes=_few)
class Cached(Engine):
    def __init__(self, problem: Sampling) -> None:
        super().__init__(problem, "torch")

    def extrapolated(self, threads: int) -> Entry:
        return torch_steps(self.problem.prior, self.problem.request, threads)


@peer("sampling", name="cpu")
def cpu(problem: Sampling) -> Engine:
    if not _engine.available():
        raise LeftOutError(str(_engine.why_unavailable()))
    return Engine(problem, "cpu")


@peer("sampling", name="cpu bf16", takes=lambda case: case.batch in case.bf16_batches)
def cpu_bf16(problem: Sampling) -> Engine:
    if not _engine.available():
        raise LeftOutError(str(_engine.why_unavailable()))
    return Engine(problem, "cpu", bfloat16=True)
