"""The sampler's engines on a GPU: ``python -m bench.gpu.sampler --out DIR --seconds N`` writes DIR/sampler.json.

Default priors (256 channels), strict and inclusive, batch 1 to 256: the ``cuda`` engine in float32 and bfloat16, with
and without a CUDA graph, the ``torch`` engine at some rows, eager and recorded as graphs, and the naive sampler at some
rows. Codes of exact engines are checked against the naive model's logits. Small priors are sampled 100 times over and
must give the same codes every time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.cases import SAMPLER_CASES, SamplerCase
from bench.clock import Timed, clock, synchronise
from bench.engines import TorchSteps
from bench.gpu import probes
from bench.gpu.engines import phase_seconds
from bench.gpu.files import load, save
from bench.gpu.floors import Rates, floor_seconds
from bench.gpu.lines import LATE, LEGEND, Line, both_levels, failures, table
from bench.sampler import check_codes, request_of
from fastvq._precision import full_float32
from fastvq.errors import FastvqError
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw
from fastvq.sampling import EngineOptions, Explanation, describe
from fastvq.sampling.engines import fill, why_not
from fastvq.sampling.request import SampleRequest

BATCHES = (1, 64, 16, 256)
PRIORS = ("default-strict-bottom", "default-strict-top", "default-inclusive-bottom", "default-inclusive-top")
REPEATED, RUNS = ("small-strict-top", "small-inclusive-bottom"), 100
FILE = "sampler.json"
# The naive sampler runs the whole network, which at batch 256 would take the card's memory.
_NAIVE_BATCH = 16
_CHECKED = 2
_TARGET_SECONDS, _MOST_REPEATS = 2.0, 20

# Ways in which the ``cuda`` engine can run; all but bfloat16 promise the naive sampler's codes. Where there is no
# attention it samples along a front unless a row kernel asks for rows.
VARIANTS = {
    "cuda": EngineOptions(),
    "cuda bf16": EngineOptions(precision="bfloat16"),
    "cuda graph": EngineOptions(cuda_graph=True),
    "cuda bf16 graph": EngineOptions(precision="bfloat16", cuda_graph=True),
    "cuda rows": EngineOptions(row_kernel="library"),
}
# The time may end anywhere, so what is compared most comes first.
ORDER = (
    *("cuda graph", "cuda bf16 graph", "cuda", "cuda bf16", "cuda rows", "naive", "torch"),
    "torch graph",
)


def case_of(name: str, batch: int, *, small: bool = False) -> SamplerCase:
    """A case of the CPU's list at another batch size, or its small twin."""
    case = next(case for case in SAMPLER_CASES if case.name == name)
    return dataclasses.replace(case, config=case.small_config if small else case.config, batch=batch)


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
    def of(cls, case: SamplerCase, device: str = "cuda", engine: str = "cuda") -> Problem:
        prior = case.prior().to(device)
        request = request_of(prior, case.batch, case.inputs(prior))
        return cls(case, torch.device(device), prior, request, describe(prior), engine)

    def run(self, options: EngineOptions, row_done: Callable[[int], None] = lambda rows: None) -> Tensor:
        return fill(self.engine, self.prior, self.request, row_done, options)

    def line(self, engine: str) -> Line:
        return Line(self.case.name, self.case.batch, engine)


class _EnoughError(Exception):
    """Raised to leave an engine after its first row."""


Left = Callable[[], float]
Log = Callable[[str], None]


def run_case(
    problem: Problem, rates: Rates | None, left: Left, log: Log, names: Sequence[str] = ORDER, runs: int = 1
) -> list[Line]:
    """Time and check what fits into the time that is left; the rest is named.

    Args:
        runs: the least number of runs of the ``cuda`` engine, whatever time is left.
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
            line = _attempt(problem, name, left, runs)
            log(f"  {line}")
        if rates is not None and line.left_out is None:
            precision = "float32" if line.exact else "bfloat16"
            line.floor = floor_seconds(problem.explanation, problem.case.batch, precision, rates)
        lines.append(line)
    return lines


def _attempt(problem: Problem, name: str, left: Left, runs: int) -> Line:
    try:
        if name in VARIANTS:
            return cuda_line(problem, name, left, runs)
        with full_float32(problem.device):
            return naive_line(problem) if name == "naive" else torch_line(problem, recorded=name == "torch graph")
    except (FastvqError, RuntimeError) as error:
        line = problem.line(name)
        line.left_out = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    try:
        # An illegal address or a failed launch stays with the process; what comes after would only repeat it.
        synchronise(problem.device)
    except RuntimeError:
        line.device_failed = True
    return line


def cuda_line(problem: Problem, name: str, left: Left, runs: int = 1) -> Line:
    """Whole grids, again and again, which must have the same codes every time."""
    options, gpu = VARIANTS[name], problem.device.type == "cuda"
    line = problem.line(name)
    line.exact = options.precision == "float32"
    _warm_up(problem, options)
    before = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    first, differ = None, 0

    def go_on() -> bool:
        return sum(line.seconds) < _TARGET_SECONDS and len(line.seconds) < _MOST_REPEATS and left() > 0

    while len(line.seconds) < runs or go_on():
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
        if not options.cuda_graph:
            line.facts["phase_seconds"] = phase_seconds(problem.engine, problem.prior, problem.request, options)
    return line


def _warm_up(problem: Problem, options: EngineOptions) -> None:
    """Packs weights and loads kernels, or records the graph."""

    def row_done(rows: int) -> None:
        if not options.cuda_graph:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        problem.run(options, row_done)
    synchronise(problem.device)


@torch.inference_mode()
def naive_line(problem: Problem) -> Line:
    """The naive sampler at some positions. Its work does not depend on the codes, so one batch serves for all."""
    batch, prior, line = min(problem.case.batch, _NAIVE_BATCH), problem.prior, problem.line("naive")
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
    return line


@torch.inference_mode()
def torch_line(problem: Problem, *, recorded: bool) -> Line:
    """The ``torch`` engine at steps spread over the grid; the codes of the first rows are checked.

    Recorded: what follows a step's row phase is replayed as a graph. Every step has a graph of its own, and recording
    it takes longer than running it, so that this pays for sampling many batches only; the time is that of replays. What
    a draw checks beforehand cannot be recorded and is left out.
    """
    device, steps = problem.device, TorchSteps(problem.prior, problem.request)
    line, codes = problem.line("torch graph" if recorded else "torch"), steps.grid.codes
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
    return line


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


def run(folder: Path, limit: float) -> int:
    """All cases, as far as the time goes; the file is written after each. Returns the exit status."""
    start = time.monotonic()
    found = load(folder / probes.FILE) or probes.measure()
    rates = probes.rates_of(found)
    lines: list[Line] = []

    def log(line: str) -> None:
        print(line, flush=True)

    def done(more: list[Line]) -> bool:
        lines.extend(more)
        stored = [dataclasses.asdict(line) for line in lines]
        save(folder / FILE, {"gpu_flops_per_s": found["gpu_flops_per_s"], "lines": stored})
        return any(line.device_failed for line in more)

    for name in REPEATED:
        done(run_case(Problem.of(case_of(name, 8)), rates, lambda: 1.0, log, tuple(VARIANTS), RUNS))
    begun = time.monotonic()
    jobs = [(name, batch) for name in PRIORS for batch in BATCHES]
    for count, (name, batch) in enumerate(jobs, 1):
        # Every case gets its share of what the ones before it have left.
        share = (limit - (begun - start)) * count / len(jobs)

        def left(share: float = share) -> float:
            return share - (time.monotonic() - begun)

        log(f"{name}, batch {batch}")
        if left() <= 0:
            done([Line(name, batch, engine, left_out=LATE) for engine in ORDER])
        elif done(run_case(Problem.of(case_of(name, batch)), rates, left, log)):
            break
        torch.cuda.empty_cache()
    print("\n".join([*table(lines), *both_levels(lines), *LEGEND]))
    wrong = failures(lines)
    if rates is None:
        wrong.append("no floors: the probes of blocks are missing")
    print("\n".join(wrong) if wrong else "all checks passed")
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sampler", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after this long (default: 240)")
    options = parser.parse_args(arguments)
    return run(options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
