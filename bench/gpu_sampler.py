"""The sampler's engines on a GPU: ``python -m bench.gpu_sampler --out DIR --seconds N`` writes DIR/sampler.json.

Default priors (256 channels), strict and inclusive, batch 1 to 256: the ``cuda`` engine in float32 and bfloat16, with
and without a CUDA graph, the ``torch`` engine at some rows, eager and recorded as graphs, and the naive sampler at some
rows. Codes of exact engines are checked against the naive model's logits. Small priors are sampled 100 times over and
must give the same codes every time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench import gpu_probes
from bench.cases import SAMPLER_CASES, SamplerCase
from bench.engines import request_of, torch_row
from bench.files import write_json
from bench.gpu_floors import GpuRates, floor_seconds, work_of
from bench.gpu_report import LATE, LEGEND, both_levels, failures, table
from bench.harness import Check, Entry, Memory, Recorder, Result, synchronise, timed
from bench.report import seconds
from bench.sampler import check_codes, naive_pace, sum_over_rows, torch_rows
from fastvq._precision import full_float32
from fastvq.errors import FastvqError
from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions, Explanation, describe
from fastvq.sampling.engines import fill, plan_of, static_inputs, why_not
from fastvq.sampling.request import SampleRequest
from fastvq.sampling.state import CompiledPlan, GridState
from fastvq.sampling.torch_engine import TorchStep

BATCHES = (1, 64, 16, 256)
PRIORS = ("default-strict-bottom", "default-strict-top", "default-inclusive-bottom", "default-inclusive-top")
REPEATED = ("small-strict-top", "small-inclusive-bottom")
FILE = "sampler.json"
# The naive sampler runs the whole network, which at batch 256 would take the card's memory.
_NAIVE_BATCH = 16
_CHECKED = 2
_TARGET_SECONDS, _MOST_REPEATS = 2.0, 20


@dataclass(frozen=True)
class Variant:
    """A way in which the ``cuda`` engine can run; all but bfloat16 promise the naive sampler's codes."""

    name: str
    options: EngineOptions

    @property
    def exact(self) -> bool:
        return self.options.precision == "float32"


VARIANTS = (
    Variant("cuda", EngineOptions()),
    Variant("cuda bf16", EngineOptions(precision="bfloat16")),
    Variant("cuda graph", EngineOptions(cuda_graph=True)),
    Variant("cuda bf16 graph", EngineOptions(precision="bfloat16", cuda_graph=True)),
    Variant("cuda triton rows", EngineOptions(row_kernel="triton")),
)
# The time may end anywhere, so what is compared most comes first.
ORDER = ("cuda", "cuda bf16", "naive", "torch", "cuda bf16 graph", "cuda graph", "cuda triton rows", "torch graph")


def case_of(name: str, batch: int, *, small: bool = False) -> SamplerCase:
    """A case of the CPU's list at another batch size, or its small twin."""
    case = next(case for case in SAMPLER_CASES if case.name == name)
    config = case.small_config if small else case.config
    naive = min(batch, _NAIVE_BATCH)
    return dataclasses.replace(case, config=config, batch=batch, naive_batch=naive, checked=_CHECKED)


@dataclass
class Problem:
    """A case on a device, with all that its engines share."""

    case: SamplerCase
    device: str
    prior: Prior
    request: SampleRequest
    explanation: Explanation

    @classmethod
    def of(cls, case: SamplerCase, device: str) -> Problem:
        prior = case.prior().to(device)
        return cls(case, device, prior, request_of(prior, case.batch, case.inputs(prior)), describe(prior))

    def run(self, engine: str, options: EngineOptions, row_done: Callable[[], None] = lambda: None) -> Tensor:
        return fill(engine, self.prior, self.request, row_done, options)


# A fact of a result in whose course the GPU stopped working.
DEVICE_FAILED = "device_failed"


class _EnoughError(Exception):
    """Raised to leave an engine after its first row."""


def run_case(
    problem: Problem, recorder: Recorder, rates: GpuRates | None, left: Callable[[], float], engine: str = "cuda"
) -> Result:
    """Time and check what fits into the time that is left; the rest is named."""
    case = problem.case
    floors = {
        precision: work_of(problem.explanation, case.batch, precision, rates) if rates else []
        for precision in ("float32", "bfloat16")
    }
    result = Result("sampling on a GPU", case.name, case.batch, [], work=list(floors["float32"]))
    reason = why_not(engine, problem.prior)
    makers: dict[str, Callable[[], Entry]] = {
        variant.name: functools.partial(_cuda_entry, problem, variant, engine, left, result) for variant in VARIANTS
    }
    makers |= {
        "torch": lambda: _on(problem, lambda: torch_rows(problem.prior, problem.request, 1, case.checked)),
        "torch graph": lambda: _on(problem, lambda: graph_rows(problem)),
        "naive": lambda: _on(problem, lambda: _naive(problem)),
    }
    for name in ORDER:
        if DEVICE_FAILED in result.facts:
            result.left_out[name] = "not run: the device had failed"
        elif name.startswith("cuda") and reason is not None:
            result.left_out[name] = reason
        else:
            _try(result, name, recorder, left, makers[name])
    for entry in result.entries:
        work = floors["bfloat16" if not entry.exact else "float32"]
        if work and not recorder.quick:
            floor = floor_seconds(list(work), recorder.ceilings)
            entry.facts |= {"floor_seconds": floor, "time_over_floor": entry.median / floor}
    return result


def _try(result: Result, name: str, recorder: Recorder, left: Callable[[], float], make: Callable[[], Entry]) -> None:
    """Add an entry, or say why there is none."""
    if left() <= 0:
        result.left_out[name] = LATE
        return
    try:
        entry = make()
    except (FastvqError, RuntimeError) as error:
        result.left_out[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        recorder.log(f"  {name}: {result.left_out[name]}")
        try:
            # An illegal address or a failed launch stays with the process; what comes after would only repeat it.
            synchronise("cuda" if torch.cuda.is_available() else "cpu")
        except RuntimeError:
            result.facts[DEVICE_FAILED] = True
        return
    entry.peer = name
    result.entries.append(entry)
    how = entry.extrapolated or (entry.check.summary if entry.check else "not exact")
    recorder.log(f"  {name}: {seconds(entry.median)} x {len(entry.seconds)}; {how}")


def _on(problem: Problem, make: Callable[[], Entry]) -> Entry:
    with full_float32(torch.device(problem.device)):
        return make()


def _naive(problem: Problem) -> Entry:
    return naive_pace(problem.case, problem.prior, problem.request, 1).entry()


def _cuda_entry(problem: Problem, variant: Variant, engine: str, left: Callable[[], float], result: Result) -> Entry:
    if not variant.options.cuda_graph:
        _first_row(problem, engine, variant.options)
    else:
        problem.run(engine, variant.options)  # recording it
    gpu = torch.device(problem.device).type == "cuda"
    before = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times: list[float] = []
    codes: list[Tensor] = []
    while not times or (sum(times) < _TARGET_SECONDS and len(times) < _MOST_REPEATS and left() > 0):
        codes[:] = codes[:1]
        times.append(timed(lambda: codes.append(problem.run(engine, variant.options)), device=problem.device))
    if gpu and not variant.options.cuda_graph:
        # Of what PyTorch allocates for a call; weights are packed once.
        measured = torch.cuda.max_memory_allocated() - before
        predicted = problem.case.batch * problem.explanation.cache_bytes
        result.memory.append(Memory(variant.name, measured, predicted))
    entry = Entry(variant.name, times, None, exact=variant.exact)
    entry.facts["repeats_identical"] = bool(torch.equal(codes[0], codes[-1]))
    check = _on_check(problem, codes[-1])
    if variant.exact:
        same = entry.facts["repeats_identical"]
        entry.check = Check(check.passed and same, check.summary + ("" if same else "; repeats differ"), check.facts)
    else:
        entry.facts["codes_outside"] = check.facts["outside"] / check.facts["positions"]
        entry.remarks.append(f"{entry.facts['codes_outside']:.2%} of codes outside the float32 margin")
    if not variant.options.cuda_graph:
        entry.facts["row_phase_seconds_alone"] = _row_phase(problem, variant.options)
    return entry


def _on_check(problem: Problem, codes: Tensor) -> Check:
    with full_float32(torch.device(problem.device)):
        return check_codes(problem.prior, problem.request, codes, problem.case.checked)


def _first_row(problem: Problem, engine: str, options: EngineOptions) -> None:
    """Packs weights and loads kernels."""

    def row_done() -> None:
        raise _EnoughError

    with contextlib.suppress(_EnoughError):
        problem.run(engine, options, row_done)
    synchronise(problem.device)


@torch.inference_mode()
def _row_phase(problem: Problem, options: EngineOptions) -> float:
    """Seconds of all rows' row phases one after the other, with no steps in between."""
    device = torch.device(problem.device)
    with full_float32(device):
        compiled = CompiledPlan(plan_of(problem.prior), device, options.row_kernel)
        state = GridState(compiled, problem.case.batch, static_inputs(problem.prior, problem.request))
        state.codes.random_(compiled.plan.num_codes)
        state.begin_row(0)
        state.begin_row(1)

        def rows() -> None:
            for row in range(2, compiled.plan.shape[0]):
                state.begin_row(row)

        return timed(rows, device=problem.device) * compiled.plan.shape[0] / max(1, compiled.plan.shape[0] - 2)


def _unchecked(*_: object) -> None:
    """In place of a check that reads results on the host."""


@torch.inference_mode()
def graph_rows(problem: Problem) -> Entry:
    """The ``torch`` engine with the steps of a row recorded as one graph: three rows, and the rest extrapolated.

    Every row has a graph of its own, and recording it takes longer than running it, so that this pays for sampling many
    batches only; the time is that of replays. What a draw checks beforehand cannot be recorded and is left out.
    """
    device = torch.device(problem.device)
    compiled = CompiledPlan(plan_of(problem.prior), device)
    step = TorchStep(compiled)
    state = GridState(compiled, problem.case.batch, static_inputs(problem.prior, problem.request))
    state.codes.random_(compiled.plan.num_codes)
    height, width = compiled.plan.shape
    rows = sorted({height // 4, height // 2, 3 * height // 4})
    spent, check = [], Check(True, "not compared")
    for row in rows:
        begin = timed(state.begin_row, row, device=problem.device)
        torch_row(step, state, problem.request, row, width)  # loads kernels, and the codes to compare with
        expected = state.codes[:, row].clone()
        with mock.patch("fastvq.ops.draw._check_rows", _unchecked):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                torch_row(step, state, problem.request, row, width)
        state.codes[:, row].random_(compiled.plan.num_codes)  # what was drawn must not pass for what is drawn now
        graph.replay()
        replays = [timed(graph.replay, device=problem.device) for _ in range(3)]
        spent.append(begin + sorted(replays)[1])
        differ = int((state.codes[:, row] != expected).sum())
        if differ or row == rows[0]:
            check = Check(differ == 0, f"{differ} codes of row {row} differ from eager ones")
    how = f"extrapolated from complete rows {rows}, steps replayed from graphs"
    total = sum_over_rows(rows, spent, height, degree=1)
    return Entry("torch graph", [total], check, extrapolated=how, facts={"rows": rows, "seconds_per_row": spent})


def repeatability(name: str, device: str, engine: str = "cuda", runs: int = 100, *, small: bool = False) -> Result:
    """A small prior sampled again and again: the codes of every run must be those of the first, bit for bit."""
    problem = Problem.of(case_of(name, 8, small=small), device)
    result = Result("sampling again and again", name, 8, [])
    reason = why_not(engine, problem.prior)
    for variant in VARIANTS:
        if reason is not None:
            result.left_out[variant.name] = reason
            continue
        options = variant.options if engine == "cuda" else EngineOptions()
        try:
            first = problem.run(engine, options).clone()
            times, differ = [], 0
            for _ in range(runs):
                drawn: list[Tensor] = []
                times.append(timed(lambda o=options, d=drawn: d.append(problem.run(engine, o)), device=device))
                differ += not torch.equal(drawn[0], first)
        except (FastvqError, RuntimeError) as error:
            result.left_out[variant.name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        check = Check(differ == 0, f"{differ} of {runs} runs differ from the first", {"runs": runs, "differ": differ})
        if variant.exact and check.passed:
            right = _on_check(problem, first)
            check = Check(right.passed, f"{check.summary}; {right.summary}", check.facts | right.facts)
        result.entries.append(Entry(variant.name, times, check, exact=variant.exact))
    return result


def run(folder: Path, limit: float, device: str = "cuda") -> int:
    """All cases, as far as the time goes; the file is written after each. Returns the exit status."""
    start = time.monotonic()
    recorder = Recorder(quick=False, log=lambda line: print(line, flush=True))
    found = gpu_probes.load(folder) or gpu_probes.measure()
    recorder.ceilings.gpu = found["gpu_flops_per_s"]
    rates = gpu_probes.rates_of(found)
    for name in REPEATED:
        recorder.results.append(repeatability(name, device))
        write_json(recorder, folder / FILE)
    begun = time.monotonic()
    jobs = [(name, batch) for name in PRIORS for batch in BATCHES]
    for done, (name, batch) in enumerate(jobs):
        # Every case gets its share of what the ones before it have left.
        share = (limit - (begun - start)) * (done + 1) / len(jobs)

        def left(share: float = share) -> float:
            return share - (time.monotonic() - begun)

        recorder.log(f"{name}, batch {batch}")
        if left() <= 0:
            skipped = Result("sampling on a GPU", name, batch, [], left_out=dict.fromkeys(ORDER, LATE))
            recorder.results.append(skipped)
        else:
            recorder.results.append(run_case(Problem.of(case_of(name, batch), device), recorder, rates, left))
        write_json(recorder, folder / FILE)
        if DEVICE_FAILED in recorder.results[-1].facts:
            break
        torch.cuda.empty_cache()
    print("\n".join([*table(recorder.results), *both_levels(recorder.results), *LEGEND]))
    wrong = failures(recorder.results)
    if rates is None:
        wrong.append("no floors: the probes of blocks are missing")
    print("\n".join(wrong) if wrong else "all checks passed")
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sampler", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after this long (default: 240)")
    options = parser.parse_args(arguments)
    return run(options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
