"""How the sampler's engines are timed, checked against the naive model, and measured against what has to be done."""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.cases import SamplerCase
from bench.harness import Check, Entry, Memory, Peer, Recorder, Result, Work, measure, timed, using_threads
from bench.machine import ROOT, private_cache_bytes
from fastvq import _engine, sample
from fastvq.models.prior import Prior
from fastvq.ops.draw import draw, draw_margin
from fastvq.sampling import EngineOptions, Explanation, describe
from fastvq.sampling.engines import fill, plan_of, static_inputs
from fastvq.sampling.engines.pytorch import TorchStep, sample_torch
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.request import SampleRequest, Settings, build_request

BF16 = "cpu bf16"
# How far outside its code's interval a uniform number may lie. Float32 engines round sums of some thousand products
# differently: logits of order 1 differ by up to about 5e-6, and the ends of an interval by at most as much.
MARGIN = 5e-6
# Arithmetic of this many seconds with all threads is enough for them not to be in each other's way.
_MANY_THREADS_PAY = 2.0


class _EnoughError(Exception):
    """Raised to leave an engine after some rows."""


def run_case(case: SamplerCase, recorder: Recorder) -> Result:
    """Time every engine on a case, and check what each has drawn in the same run."""
    prior = case.prior()
    inputs = case.inputs(prior)
    request = request_of(prior, case.batch, inputs)
    explanation = describe(prior)
    result = Result(case.operation, case.name, case.batch, [], work=_work(explanation, case.batch))
    if not recorder.quick:
        recorder.ceilings.measure_gemm()
        recorder.ceilings.measure_read(explanation.step_weight_bytes)

    peers: list[Peer] = []
    phases: dict[str, list[float]] = {}
    for name in _names(case):
        if recorder.quick:
            paces = [Pace(0.0, torch.get_num_threads())]
        else:
            flops = explanation.naive_flops if name == "naive" else explanation.row_flops + explanation.step_flops
            small = flops * case.batch / recorder.ceilings.rate < _MANY_THREADS_PAY
            paces = _paces(name, case, prior, request, both=small)
        if name in ("naive", "torch") and paces[0].seconds > case.full_seconds:
            entry = paces[0].entry() if name == "naive" else torch_rows(prior, request, paces[0].threads)
            result.entries.append(entry)
            recorder.log(f"  {name}: {entry.median:.3g} s, {entry.extrapolated}")
        else:
            peers += [_peer(name, pace.prior or prior, case.batch, inputs, pace, phases) for pace in paces]
    seconds, codes = measure(peers, quick=recorder.quick)

    # Each engine in its better form: one thread or all.
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best: dict[str, Peer] = {}
    for peer in sorted(peers, key=lambda peer: medians[peer.name]):
        best.setdefault(peer.name.partition("/")[0], peer)
    reference = codes[best["naive"].name] if "naive" in best else None
    for name, peer in best.items():
        drawn = codes[peer.name]
        assert isinstance(drawn, Tensor)
        others = {other: times for other, times in seconds.items() if other.startswith(f"{name}/")}
        facts = {"threads": peer.threads, "seconds_by_threads": others}
        entry = Entry(name, seconds[peer.name], None, exact=name != BF16, facts=facts)
        if entry.exact:
            entry.check = check_codes(prior, request, drawn, case.checked)
            entry.facts.update(_agreement(drawn, reference))
        if phases.get(peer.name):
            entry.facts["row_phase_seconds"] = phases[peer.name]
        result.entries.append(entry)
        recorder.log(f"  {name}: {entry.median:.3g} s x {len(entry.seconds)}; {_verdict(entry)}")
    result.entries.sort(key=lambda entry: ("naive", "torch", "cpu", BF16).index(entry.peer))
    if case.memory and not recorder.quick and _engine.available():
        result.memory.append(measure_memory(case))
    return result


def _names(case: SamplerCase) -> list[str]:
    """Engines that this machine can run."""
    names = ["naive", "torch"]
    if _engine.available():
        names += ["cpu", *([BF16] if case.batch in case.bf16_batches else [])]
    return names


def request_of(prior: Prior, batch: int, inputs: dict[str, Any]) -> SampleRequest:
    """What :func:`fastvq.sample` makes of its arguments."""
    rest: dict[str, Any] = {"noise": None, "init_codes": None, "mask": None, "start": 0}
    return build_request(prior, batch, settings=Settings(), **inputs, **rest)


def _peer(
    name: str, prior: Prior, batch: int, inputs: dict[str, Any], pace: Pace, phases: dict[str, list[float]]
) -> Peer:
    """The public call, with a note of the seconds that it spends on whole rows."""
    options, label = _options(name), f"{name}/{pace.threads}"

    def run() -> Tensor:
        with _timed_rows() as spent:
            codes = sample(
                prior, batch, **inputs, engine=name.split()[0], micro_batch=batch, precision=options.precision
            )
        if spent:
            phases.setdefault(label, []).append(sum(spent))
        return codes

    return Peer(label, run, pace.seconds, pace.threads)


def _options(name: str) -> EngineOptions:
    return EngineOptions(precision="bfloat16" if name == BF16 else "float32")


@contextlib.contextmanager
def _timed_rows() -> Iterator[list[float]]:
    """Seconds of every row phase inside the block."""
    spent: list[float] = []
    begin_row = GridState.begin_row

    def timed_row(state: GridState, row: int) -> None:
        start = time.perf_counter()
        begin_row(state, row)
        spent.append(time.perf_counter() - start)

    with mock.patch.object(GridState, "begin_row", timed_row):
        yield spent


# --- how long it would take ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """What an engine is expected to take, and with how many threads; of the naive one also how that was found out.

    Attributes:
        prior: of its own, where the engine keeps weights packed for this number of threads or precision.
    """

    seconds: float
    threads: int
    how: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    prior: Prior | None = None

    def entry(self) -> Entry:
        facts = {"threads": self.threads, **self.facts}
        return Entry("naive", [self.seconds], Check(True, "the reference"), extrapolated=self.how, facts=facts)


def _paces(name: str, case: SamplerCase, prior: Prior, request: SampleRequest, *, both: bool) -> list[Pace]:
    """The pace of an engine with all threads, and if ``both`` with one; it is warm for both afterwards.

    On small tensors threads mostly wait for each other, in the naive sampler most of all. No ratio should owe anything
    to that, so every engine is timed both ways and the better one counts.
    """

    def pace(threads: int) -> Pace:
        # An engine keeps weights packed for one setting only.
        own = copy.deepcopy(prior) if name == BF16 or (threads == 1 and name == "cpu") else None
        with using_threads(threads):
            if name == "naive":
                return naive_pace(case, prior, request, threads)
            _first_rows(name, own or prior, request)  # packs weights and sets up kernels
            return Pace(_first_rows(name, own or prior, request), threads, prior=own)

    counts = {torch.get_num_threads(), 1} if both else {torch.get_num_threads()}
    # The quickest first: it decides whether the engine can be measured in full.
    paces = sorted((pace(threads) for threads in counts), key=lambda pace: pace.seconds)
    return [pace for pace in paces if pace.seconds < 3 * paces[0].seconds]


def naive_pace(case: SamplerCase, prior: Prior, request: SampleRequest, threads: int) -> Pace:
    # The naive sampler's work does not depend on the codes, so one batch serves for all.
    batch = min(case.batch, case.naive_batch)
    rows, seconds = _naive_rows(prior, request.rows(torch.arange(batch)))
    height, width = prior.config.shape
    # Work per position is linear in the number of rows for convolutions and quadratic for attention.
    total = _sum_over_rows(rows, seconds, height, degree=2) * width * case.batch / batch
    how = f"extrapolated from a forward pass at each of rows {rows}"
    if batch < case.batch:
        how += f" at batch {batch}, times {case.batch / batch:g}"
    return Pace(total, threads, how, {"rows": rows, "seconds_per_position": seconds, "measured_batch": batch})


def _first_rows(name: str, prior: Prior, request: SampleRequest, count: int = 3) -> float:
    """Seconds that all rows would take at the pace of the last of the first few."""
    height = prior.config.shape[0]
    ticks = [time.perf_counter()]

    def row_done() -> None:
        ticks.append(time.perf_counter())
        if len(ticks) > count:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        fill(name.split()[0], prior, request, row_done, _options(name))
    return (ticks[-1] - ticks[-2]) * height


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
def torch_rows(prior: Prior, request: SampleRequest, threads: int, samples: int | None = None) -> Entry:
    """The ``torch`` engine's time from complete rows spread over the grid, and a check of its first rows."""
    with using_threads(threads):
        return _timed_torch_rows(prior, request, threads, samples)


def _timed_torch_rows(prior: Prior, request: SampleRequest, threads: int, samples: int | None) -> Entry:
    batch = request.noise.shape[0]
    height, width = prior.config.shape
    compiled = CompiledPlan(plan_of(prior), request.noise.device)
    step = TorchStep(compiled)
    state = GridState(compiled, batch, static_inputs(prior, request))
    done: list[int] = []

    def row_done() -> None:
        done.append(len(done))
        if len(done) == 3:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        sample_torch(compiled, step, state, request, row_done)
    check = check_codes(prior, request, state.codes[:, : len(done)].clone(), samples)
    # What the caches hold does not change the amount of work, so a row in the middle needs no rows before it.
    for ring in state.rings.values():
        ring.data.normal_()
    for cache in (*state.keys.values(), *state.values.values()):
        cache.normal_()
    state.codes.random_(compiled.plan.num_codes)
    rows = sorted({height // 4, height // 2, 3 * height // 4})
    seconds, spent = [], []
    device = str(request.noise.device)
    for row in rows:
        spent.append(timed(state.begin_row, row, device=device))
        seconds.append(spent[-1] + timed(_torch_row, step, state, request, row, width, device=device))
    total = _sum_over_rows(rows, seconds, height, degree=1)
    how = f"extrapolated from complete rows {rows}; codes of the first {len(done)} rows checked"
    facts = {
        "threads": threads,
        "rows": rows,
        "seconds_per_row": seconds,
        "row_phase_seconds": [_sum_over_rows(rows, spent, height, degree=1)],
    }
    return Entry("torch", [total], check, extrapolated=how, facts=facts)


def _torch_row(step: TorchStep, state: GridState, request: SampleRequest, row: int, width: int) -> None:
    for column in range(width):
        drawn = draw(step.logits(state, row, column), request.noise[:, row, column], backend="torch")
        known = request.known[:, row, column]
        state.codes[:, row, column] = torch.where(known, request.init_codes[:, row, column], drawn)


def _sum_over_rows(rows: list[int], seconds: list[float], height: int, *, degree: int) -> float:
    """Sum over all rows of the polynomial that fits the measured ones best."""
    # Trapezoids would overestimate a convex cost, which is that of an opponent.
    fit = np.polyfit(rows, seconds, min(degree, len(rows) - 1))
    return max(float(np.polyval(fit, np.arange(height)).sum()), max(seconds))


# --- whether it is right ------------------------------------------------------------------------------------------


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


def _agreement(codes: Tensor, reference: object) -> dict[str, Any]:
    """Share of grids that equal those of the naive sampler."""
    if not isinstance(reference, Tensor):
        return {}
    return {"identical_grids": float((codes == reference).flatten(1).all(1).float().mean())}


def _verdict(entry: Entry) -> str:
    if entry.check is None:
        return "not exact"
    return ("" if entry.check.passed else "CHECK FAILED: ") + entry.check.summary


# --- what has to be done ------------------------------------------------------------------------------------------


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
    command = [sys.executable, "-m", "bench.memory", case.id, *(["--small"] if small else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Memory("cpu", found["measured"], found["predicted"])
