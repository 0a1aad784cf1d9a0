"""The sampler's engines in one case on a GPU: each timed, checked, and a line about it."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.cases import SamplerCase
from bench.causal import mask_convolutions
from bench.clock import Timed, clock, synchronise
from bench.engines import TorchSteps
from bench.gpu.engines import phase_seconds
from bench.gpu.floors import Rates, floor_seconds
from bench.gpu.limit import OutOfTimeError, at_most
from bench.gpu.lines import LATE, Line
from bench.sampler import check_codes, request_of
from fastvq import Pipeline
from fastvq._precision import full_float32
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw
from fastvq.sampling import EngineOptions, Explanation, describe
from fastvq.sampling.engines import RowDone, fill, why_not
from fastvq.sampling.request import SampleRequest

# That one line may take.
LINE_SECONDS = 15.0
# The naive sampler runs the whole network, which at batch 256 would take the card's memory.
_NAIVE_BATCH = 16
_CHECKED = 2
# Of whole grids; one is enough to see a factor.
_TARGET_SECONDS, _MOST_REPEATS = 0.5, 10

# Ways in which the ``cuda`` engine can run; all but bfloat16 promise the naive sampler's codes. Where there is no
# attention it samples along a front unless a row kernel asks for rows.
VARIANTS = {
    "cuda": EngineOptions(),
    "cuda bf16": EngineOptions(precision="bfloat16"),
    "cuda graph": EngineOptions(cuda_graph=True),
    "cuda bf16 graph": EngineOptions(precision="bfloat16", cuda_graph=True),
    "cuda rows": EngineOptions(row_kernel="library"),
}


@dataclass
class Problem:
    """A case on a device, with all that its engines share; on a CPU another engine stands in for ``cuda``."""

    case: SamplerCase
    device: torch.device
    prior: Prior
    request: SampleRequest
    explanation: Explanation
    engine: str

    @classmethod
    def of(cls, case: SamplerCase, device: str = "cuda", engine: str = "cuda", prior: Prior | None = None) -> Problem:
        """``prior``: that of the case, if it has been made."""
        prior = case.prior().to(device) if prior is None else prior
        request = request_of(prior, case.batch, case.inputs(prior))
        return cls(case, torch.device(device), prior, request, describe(prior), engine)

    def run(self, options: EngineOptions, row_done: RowDone = lambda rows, codes: None) -> Tensor:
        return fill(self.engine, self.prior, self.request, row_done, options)

    def line(self, engine: str) -> Line:
        return Line(self.case.name, self.case.batch, engine)


class _EnoughError(Exception):
    """Raised to leave an engine after its first row."""


Left = Callable[[], float]
Done = Callable[[Line], None]


def run_case(
    problem: Problem, rates: Rates | None, left: Left, done: Done, names: Sequence[str], runs: int = 1
) -> list[Line]:
    """Time and check what fits into the time that is left; the rest is named.

    Args:
        done: is given each line at once.
        runs: how often the ``cuda`` engine is to run, if the time suffices.
    """
    reason = why_not(problem.engine, problem.prior)
    lines: list[Line] = []
    for name in names:
        line = problem.line(name)
        if lines and lines[-1].device_failed:
            line.left_out, line.device_failed = "not run: the device had failed", True
        elif name in VARIANTS and reason is not None:
            line.left_out = reason
        elif left() <= 0:
            line.left_out = LATE
        else:
            _attempt(problem, line, left, runs)
        if rates is not None and line.left_out is None:
            precision = "float32" if line.exact else "bfloat16"
            line.floor = floor_seconds(problem.explanation, problem.case.batch, precision, rates)
        lines.append(line)
        done(line)
    return lines


def _attempt(problem: Problem, line: Line, left: Left, runs: int) -> None:
    end = time.monotonic() + min(LINE_SECONDS, left())

    def until() -> float:
        return end - time.monotonic()

    with noted(line, problem.device), at_most(until()):
        if line.engine in VARIANTS:
            cuda_line(problem, line, until, runs)
        else:
            other_line(problem, line)


@contextlib.contextmanager
def noted(line: Line, device: torch.device) -> Iterator[None]:
    """What keeps a line from being found is noted in it."""
    try:
        yield
    except OutOfTimeError:
        line.left_out = LATE
    except Exception as error:
        lines = str(error).splitlines()
        line.left_out = f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
    try:
        # An illegal address or a failed launch stays with the process; what comes after would only repeat it.
        synchronise(device)
    except RuntimeError:
        line.device_failed = True


def cuda_line(problem: Problem, line: Line, left: Left, runs: int) -> None:
    """Whole grids, again and again, which must have the same codes every time."""
    options, gpu = VARIANTS[line.engine], problem.device.type == "cuda"
    line.exact = options.precision == "float32"
    warm_up(problem, options)
    before = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first, differ = None, 0

    def go_on() -> bool:
        again = sum(line.seconds) < _TARGET_SECONDS and len(line.seconds) < _MOST_REPEATS
        # Half of the time is for checks.
        return (len(line.seconds) < runs or again) and left() > spare

    spare = left() / 2
    while first is None or go_on():
        timed = clock(problem.run, options, device=problem.device)
        line.add(timed)
        first = timed.result if first is None else first
        differ += not torch.equal(timed.result, first)
    assert first is not None
    if gpu and not options.cuda_graph:
        # Of what PyTorch allocates for a call; weights are packed once.
        line.facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        line.facts["predicted_bytes"] = problem.case.batch * problem.explanation.cache_bytes
    line.judge(differ == 0, f"{differ} of {len(line.seconds)} runs differ from the first")
    with full_float32(problem.device):
        check = check_codes(problem.prior, problem.request, first, _CHECKED)
        line.facts["codes"] = check.facts
        if line.exact:
            line.judge(check.passed, check.summary)
        else:
            share = check.facts["outside"] / check.facts["positions"]
            line.judge(True, f"{share:.2%} of codes outside the float32 margin")
        if not options.cuda_graph and left() > 2 * line.median:
            line.facts["phase_seconds"] = phase_seconds(problem.engine, problem.prior, problem.request, options)


def other_line(problem: Problem, line: Line) -> None:
    """One who is no variant of the ``cuda`` engine."""
    with full_float32(problem.device):
        _OTHERS[line.engine](problem, line)


def warm_up(problem: Problem, options: EngineOptions) -> None:
    """Packs weights and loads kernels, or records the graph."""

    def row_done(rows: int, codes: Tensor) -> None:
        if not options.cuda_graph:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        problem.run(options, row_done)
    synchronise(problem.device)


@torch.inference_mode()
def naive_line(problem: Problem, line: Line) -> None:
    """The naive sampler at some positions. Its work does not depend on the codes, so one batch serves for all."""
    batch, prior = min(problem.case.batch, _NAIVE_BATCH), problem.prior
    request = problem.request.rows(torch.arange(batch))
    context = prior.context(request.condition, request.label, batch=batch)
    codes = torch.randint(prior.config.num_codes, request.init_codes.shape, device=problem.device)
    height, width = prior.config.shape

    def position(row: int) -> Tensor:
        return draw(prior.logits(codes[:, : row + 1], context)[:, :, row, 0], request.noise[:, row, 0], backend="torch")

    rows = sorted({round(row) for row in np.linspace(0, height - 1, 5)})
    # The first pass over a new shape pays for setting up library kernels.
    times = {row: [clock(position, row, device=problem.device) for _ in range(4)][1:] for row in rows}
    # Work per position is linear in the number of rows for convolutions and quadratic for attention.
    _extrapolate(line, times, height, degree=2, factor=width * problem.case.batch / batch)
    line.extrapolated = f"extrapolated from a forward pass at each of rows {rows}, batch {batch}"
    line.judge(True, "the reference")


@torch.no_grad()
def compiled_line(problem: Problem, line: Line) -> None:
    """The naive sampler on whole grids, with masked convolutions, compiled and replayed as a CUDA graph.

    Whole grids are what can be compiled once; their work does not depend on the position. Drawing is left out.
    """
    case, device = problem.case, problem.device
    batch, prior = min(case.batch, _NAIVE_BATCH), mask_convolutions(copy.deepcopy(problem.prior))
    assert isinstance(prior, Prior)
    request = problem.request.rows(torch.arange(batch))
    context = prior.context(request.condition, request.label, batch=batch)
    codes = torch.randint(prior.config.num_codes, request.init_codes.shape, device=device)
    wanted = problem.prior.logits(codes, context)
    compiled = torch.compile(prior.logits, backend="inductor" if device.type == "cuda" else "eager")
    found = compiled(codes, context)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    line.judge(error <= _COMPILED_ERROR, f"logits within {error:.1e} of the model's")

    def forward() -> object:
        return compiled(codes, context)

    if device.type == "cuda":
        forward()
        synchronise(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        forward = graph.replay
    times = [clock(forward, device=device) for _ in range(4)][1:]
    height, width = prior.config.shape
    factor = height * width * case.batch / batch
    seconds, device_seconds = (factor * statistics.median(one[i] for one in times) for i in (1, 2))
    line.add(Timed(None, seconds, device_seconds))
    line.extrapolated = f"extrapolated from forward passes of whole grids, batch {batch}"


@torch.inference_mode()
def torch_line(problem: Problem, line: Line, *, recorded: bool) -> None:
    """The ``torch`` engine at steps spread over the grid; the codes of the first rows are checked.

    Recorded: what follows a step's row phase is replayed as a graph. Every step has a graph of its own, and recording
    it takes longer than running it, so that this pays for sampling many batches only; the time is that of replays. What
    a draw checks beforehand cannot be recorded and is left out.
    """
    device, steps = problem.device, TorchSteps(problem.prior, problem.request)
    codes = steps.grid.codes
    check = check_codes(problem.prior, problem.request, steps.codes, _CHECKED)
    line.judge(check.passed, f"first {steps.codes.shape[1]} rows: {check.summary}")
    times = {}
    for step in steps.chosen:
        begin, rest = clock(steps.begin, step, device=device), [clock(steps.turns, device=device)]
        if recorded:
            expected = codes.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                steps.turns(checked=False)
            for turn in steps.grid.tile.turns:
                codes[steps.grid.tile.at(turn)] = 0  # what was drawn must not pass for what is drawn now
            rest = [clock(graph.replay, device=device) for _ in range(4)][1:]
            differ = int((codes != expected).sum())
            line.judge(differ == 0, f"{differ} codes of step {step} differ from eager ones")
        times[step] = [Timed(None, begin[1] + one[1], begin[2] + one[2]) for one in rest]
    _extrapolate(line, times, steps.steps)
    line.extrapolated = f"extrapolated from steps {list(times)}{', replayed from graphs' if recorded else ''}"


# Float32 sums of thousands of terms in other orders, through twenty layers.
_COMPILED_ERROR = 1e-3
_OTHERS: dict[str, Callable[[Problem, Line], None]] = {
    "naive": naive_line,
    "naive compiled": compiled_line,
    "torch": functools.partial(torch_line, recorded=False),
    "torch graph": functools.partial(torch_line, recorded=True),
}


def _extrapolate(
    line: Line, times: Mapping[int, Sequence[Timed]], count: int, degree: int = 1, factor: float = 1.0
) -> None:
    """Sum over all of ``count`` rows or steps of the polynomial that fits the medians of the measured ones best."""
    medians = np.median([[one[1:] for one in repeats] for repeats in times.values()], axis=1)  # [rows, 2]
    # Trapezoids would overestimate a convex cost, which is that of an opponent.
    fit = np.polyfit(list(times), medians, min(degree, len(times) - 1))
    sums = (np.vander(np.arange(count), len(fit)) @ fit).sum(0)
    seconds, device_seconds = (factor * np.maximum(sums, medians.max(0))).tolist()
    line.add(Timed(None, seconds, device_seconds))
    line.facts |= {"measured": list(times), "seconds_of_each": medians[:, 0].tolist()}
    line.facts["device_seconds_of_each"] = medians[:, 1].tolist()


@torch.inference_mode()
def pipeline_line(pipeline: Pipeline, line: Line, engine: str) -> None:
    """Both levels and the decoder, from nothing to images, through the public call."""
    options, device = VARIANTS[line.engine], pipeline.device
    line.exact = options.precision == "float32"

    def sample() -> Tensor:
        return pipeline.sample(line.batch, seed=0, engine=engine, options=options).images

    sample()
    while sum(line.seconds) < _TARGET_SECONDS:
        timed = clock(sample, device=device)
        line.add(timed)
    finite = bool(timed.result.isfinite().all())
    line.judge(finite, "images are finite" if finite else "images are not finite")
