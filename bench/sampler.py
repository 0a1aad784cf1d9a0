"""What the sampler's engines share in the benchmark, and how they are checked against the naive model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import registry
from bench.cases import PipelineCase, SamplerCase
from bench.engines import TorchSteps, request_of
from bench.harness import Check, Entry, Memory, Work, fresh_process, timed, using_threads
from bench.machine import private_cache_bytes
from fastvq import Pipeline, _engine
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw, draw_margin
from fastvq.sampling import Explanation, describe
from fastvq.sampling.request import SampleRequest

# How far outside its code's interval a uniform number may lie. Float32 engines round sums of some thousand products
# differently: logits of order 1 differ by up to about 5e-6, and the ends of an interval by at most as much.
MARGIN = 5e-6
# Arithmetic of this many seconds with all threads is enough for them not to be in each other's way.
_MANY_THREADS_PAY = 2.0


@registry.problem("sampling", "default call")
class Sampling(registry.Problem):
    """A prior and a request for a batch of grids."""

    legend = (
        "sampling: weights that exceed the second-level caches are read anew at every position, in the floor too.",
        "Check: the naive model's logits for the drawn codes must give these codes, up to a margin of rounding.",
        "Every engine runs with one thread or all, whichever suits it.",
        "Memory: beyond the model, and what was predicted.",
    )
    case: SamplerCase

    def __init__(self, case: SamplerCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        self.prior = case.prior()
        self.inputs = case.inputs(self.prior)
        self.request = request_of(self.prior, case.batch, self.inputs)
        self.explanation = describe(self.prior)
        self.work = _work(self.explanation, case.batch)
        self.codes: dict[str, Tensor] = {}

    def measure_ceilings(self) -> None:
        self.ceilings.measure_gemm()
        self.ceilings.measure_read(self.explanation.step_weight_bytes)

    def thread_counts(self, name: str) -> set[int]:
        """Numbers of threads to try.

        On small tensors threads mostly wait for each other, in the naive sampler most of all. No ratio should owe
        anything to that, so every engine is timed both ways and the better one counts.
        """
        explanation = self.explanation
        flops = explanation.naive_flops if name == "naive" else explanation.row_flops + explanation.step_flops
        both = self.tuned and flops * self.case.batch / self.ceilings.rate < _MANY_THREADS_PAY
        return {self.threads, 1} if both else {self.threads}

    def check(self, contender: registry.Contender, output: Tensor) -> Check:
        check = check_codes(self.prior, self.request, output, self.case.checked)
        self.codes[contender.name] = output
        if "naive" in self.codes:
            same = (output == self.codes["naive"]).flatten(1).all(1).float().mean()
            contender.facts["identical_grids"] = float(same)
        return check

    def memory(self, contenders: Sequence[registry.Contender]) -> list[Memory]:
        measured = self.case.memory and _engine.available() and any(one.name == "cpu" for one in contenders)
        return [measure_memory(self.case)] if measured else []


@registry.problem("pipeline call")
class PipelineCall(registry.Problem):
    """The shipped pipeline and what it is asked for; contenders give the codes of its levels."""

    legend = ("pipeline call: all levels and the decoder, checked as sampling is, level by level.",)
    case: PipelineCase

    def __init__(self, case: PipelineCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        self.pipeline = Pipeline.from_pretrained("digits")
        classes = self.pipeline.priors[0].config.num_classes
        assert classes is not None
        self.inputs = {"label": torch.arange(case.batch) % classes, "seed": 0}

    def check(self, contender: registry.Contender, output: list[Tensor]) -> Check:
        checks = []
        for level, prior in enumerate(self.pipeline.priors):
            given = {"condition": output[:level] or None, **self.inputs}
            checks.append(check_codes(prior, request_of(prior, self.case.batch, given), output[level], samples=20))
        worst = min(checks, key=lambda check: check.facts["worst_margin"])
        return Check(all(check.passed for check in checks), worst.summary, worst.facts)


@dataclass(frozen=True)
class Pace:
    """What the naive engine is expected to take with a number of threads, and how that was found out."""

    seconds: float
    threads: int
    how: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> Entry:
        facts = {"threads": self.threads, **self.facts}
        return Entry("naive", [self.seconds], Check(True, "the reference"), extrapolated=self.how, facts=facts)


def naive_pace(case: SamplerCase, prior: Prior, request: SampleRequest, threads: int) -> Pace:
    # The naive sampler's work does not depend on the codes, so one batch serves for all.
    batch = min(case.batch, case.naive_batch)
    rows, seconds = _naive_rows(prior, request.rows(torch.arange(batch)))
    height, width = prior.config.shape
    # Work per position is linear in the number of rows for convolutions and quadratic for attention.
    total = sum_over_rows(rows, seconds, height, degree=2) * width * case.batch / batch
    how = f"extrapolated from a forward pass at each of rows {rows}"
    if batch < case.batch:
        how += f" at batch {batch}, times {case.batch / batch:g}"
    return Pace(total, threads, how, {"rows": rows, "seconds_per_position": seconds, "measured_batch": batch})


@torch.inference_mode()
def _naive_rows(prior: Prior, request: SampleRequest) -> tuple[list[int], list[float]]:
    """Seconds per position of the naive sampler in some rows."""
    batch = request.noise.shape[0]
    height = prior.config.shape[0]
    context = prior.context(request.condition, request.label, batch=batch)
    device = request.noise.device
    codes = torch.randint(prior.config.num_codes, request.init_codes.shape, device=device)

    def position(row: int) -> None:
        logits = prior.logits(codes[:, : row + 1], context)[:, :, row, 0]
        draw(logits, request.noise[:, row, 0], backend="torch")

    position(0)
    # Fewer rows where one pass takes seconds.
    start = timed(position, height // 4, device=str(device))
    count = 5 if start < 1.5 else 3
    rows = sorted({round(row) for row in np.linspace(0, height - 1, count)})
    seconds = []
    for row in rows:
        times = [timed(position, row, device=str(device))]
        # The first pass over a new shape pays for setting up library kernels.
        times = times if times[0] > 1 else [timed(position, row, device=str(device)) for _ in range(3)]
        seconds.append(statistics.median(times))
    return rows, seconds


@torch.inference_mode()
def torch_steps(prior: Prior, request: SampleRequest, threads: int, samples: int | None = None) -> Entry:
    """The ``torch`` engine's time from steps spread over the grid, and a check of its first rows."""
    with using_threads(threads):
        steps = TorchSteps(prior, request)
        check = check_codes(prior, request, steps.codes, samples)
        phases, rest = [], []
        for step in steps.chosen:
            phases.append(timed(steps.begin, step, device=str(steps.device)))
            rest.append(timed(steps.turns, device=str(steps.device)))
    # The work of a step grows and shrinks with the rows that are active in it, by as much from step to step.
    every = np.arange(steps.steps)
    row_phase, total = (float(np.interp(every, steps.chosen, s).sum()) for s in (phases, np.add(phases, rest)))
    facts = {
        "threads": threads,
        "steps": steps.chosen,
        "seconds_per_step": np.add(phases, rest).tolist(),
        "row_phase_seconds": [row_phase],
    }
    how = f"extrapolated from steps {steps.chosen}; codes of the first {steps.codes.shape[1]} rows checked"
    return Entry("torch", [total], check, extrapolated=how, facts=facts)


def sum_over_rows(rows: list[int], seconds: list[float], height: int, *, degree: int) -> float:
    """Sum over all rows of the polynomial that fits the measured ones best."""
    # Trapezoids would overestimate a convex cost, which is that of an opponent.
    fit = np.polyfit(rows, seconds, min(degree, len(rows) - 1))
    return max(float(np.polyval(fit, np.arange(height)).sum()), max(seconds))


@torch.inference_mode()
def check_codes(prior: Prior, request: SampleRequest, codes: Tensor, samples: int | None = None) -> Check:
    """Is every code the one that the naive model's logits give for the codes before it, up to rounding?

    The naive model runs once on the finished grids (or their first rows): its logits at a position depend on the codes
    before it alone, so they are those that the naive sampler would have drawn from.
    """
    batch, rows = codes.shape[:2]
    chosen = torch.arange(batch)
    if samples is not None and samples < batch:
        chosen = torch.linspace(0, batch - 1, samples).round().long()
    part, codes = request.rows(chosen), codes[chosen]
    context = prior.context(part.condition, part.label, batch=len(chosen))
    worst, outside = float("inf"), 0
    for i in range(len(chosen)):
        # One after the other: margins are worked out in float64 over all codes.
        own = None if context is None else context[i : i + 1]
        logits = prior.logits(codes[i : i + 1], own).movedim(1, -1)
        margins = draw_margin(logits, part.noise[i : i + 1, :rows], codes[i : i + 1])
        worst, outside = min(worst, float(margins.min())), outside + int((margins < 0).sum())
    facts = {"samples": chosen.tolist(), "positions": codes.numel(), "outside": outside, "worst_margin": worst}
    return Check(worst >= -MARGIN, f"{outside} of {codes.numel()} codes differ, worst margin {worst:.1e}", facts)


def _work(explanation: Explanation, batch: int) -> list[Work]:
    """Products of the row phase; products of the step phase, or reading its weights anew at each position."""
    height, width = explanation.shape
    weights = explanation.step_weight_bytes
    # Weights that fit into the cores' own caches need not be read again; what remains is arithmetic.
    streamed = weights * height * width if weights > private_cache_bytes() else 0
    return [
        Work("row phase", float(explanation.row_flops * batch)),
        Work("step phase", float(explanation.step_flops * batch), float(streamed), weights),
    ]


def measure_memory(case: SamplerCase, *, small: bool = False) -> Memory:
    """Peak memory of the ``cpu`` engine in a process of its own."""
    return fresh_process("cpu", case.id, small=small)
