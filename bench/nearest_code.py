"""How assigning vectors to codes is timed, checked against float64, and measured against the product it needs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import NearestCodeCase
from bench.harness import (
    SHORT_SECONDS,
    Check,
    Entry,
    Memory,
    Peer,
    Recorder,
    Result,
    Work,
    measure,
    synchronise,
    timed,
)
from bench.machine import CPU_FLOAT32, GPU_UNITS, ROOT, Ceilings
from bench.nearest_code_contender import (
    DECAY,
    EPS,
    MOST_SECONDS,
    Averages,
    Contender,
    Problem,
    return_freed_memory,
)
from bench.nearest_code_peers import Compiled, factories

U = 2.0**-24
# How much farther than the nearest a chosen code may be, in units of u (|x| + |c|)^2, c being the
# longer of it and the nearest: the bound of
# fastvq.ops.nearest_code for widths up to 256, which grows with the square root beyond.
GAP = 16.0
_GAP_WIDTH = 256
# Of averages, relative to the sum of magnitudes: rounding is far below it, a single lost vector far above.
AVERAGES_ERROR = 1e-5
_CHECKED_ROWS = 4096
_CHECKED_SCORES = 1 << 24


def run_case(case: NearestCodeCase, recorder: Recorder) -> Result:
    """Time everyone on a case, and check what each has found in the same run."""
    # What the case before has left in cycles and in compiled functions can be gigabytes.
    _clear()
    problem = Problem(case, tuned=not recorder.quick)
    result = Result(case.operation, case.name, case.batch, [], work=[_work(case)])
    result.facts = {"shape": [case.batch, case.num_codes, case.code_dim], "what": case.what, "dtype": str(case.dtype)}
    result.facts |= {"device": case.device, "inputs": len(problem.inputs)}
    if not recorder.quick:
        _measure_ceilings(case, recorder.ceilings)
    contenders: dict[str, Contender] = {}
    peers: list[Peer] = []
    for name, kind, make in factories(problem):
        reason, contender = kind.missing(case), None
        if reason is None:
            contender = make(problem)
            expected, reason = _warm(contender, quick=recorder.quick)
        if reason is not None:
            contender = None
            _clear()
            result.left_out[name] = reason
            recorder.log(f"  {name}: left out: {reason}")
            continue
        assert contender is not None
        return_freed_memory()
        contenders[name] = contender
        peers.append(Peer(name, contender.run, expected, problem.threads, contender.prepare, case.device))
    seconds, found = measure(peers, quick=recorder.quick)
    reference = Reference()
    for name, contender in contenders.items():
        indices = found.pop(name)
        assert isinstance(indices, Tensor)
        check = check_case(reference, contender, indices) if contender.exact and contender.whole else None
        entry = Entry(name, seconds[name], check, exact=contender.exact, whole=contender.whole)
        entry.facts["threads"] = problem.threads
        entry.remarks = contender.remarks
        result.entries.append(entry)
        verdict = "" if check is None else ("" if check.passed else "CHECK FAILED: ") + check.summary
        recorder.log(f"  {name}: {entry.median:.3g} s x {len(entry.seconds)}; {verdict}")
    if not recorder.quick:
        _compare_with_forward(result, recorder.results)
        measured = [contenders[name] for name in case.memory if name in contenders]
        result.memory = [_gpu_memory(c) if case.device == "cuda" else measure_memory(case, c.name) for c in measured]
    return result


def _clear() -> None:
    gc.collect()
    return_freed_memory()


def _warm(contender: Contender, *, quick: bool) -> tuple[float, str | None]:
    """Seconds that a run is thought to take, or why it is not run; everything that happens once has happened then."""
    reason = contender.reason()
    if reason is not None:
        return 0.0, reason
    try:
        contender.tune()
        if quick:
            return 0.0, None
        expected = contender.pace()
    except Exception as error:
        # There may be no compiler for it, or one that fails.
        if not isinstance(contender, Compiled):
            raise
        return 0.0, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if expected > MOST_SECONDS and contender.name != "fastvq":
        return expected, f"about {expected:.0f} s per call, limit {MOST_SECONDS:.0f}"
    if expected < SHORT_SECONDS:
        contender.prepare()
        expected = timed(contender.run, device=contender.case.device)
    return expected, None


# --- whether it is right ------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """Some rows of an x [N, D], with the least scores and lengths of each in float64, centred."""

    rows: Tensor
    least: Tensor
    nearest: Tensor
    lengths: Tensor


class Reference:
    """Results in float64, kept for the inputs that several contenders worked on."""

    def __init__(self) -> None:
        self._known: dict[int, Checked] = {}

    def of(self, x: Tensor, codebook: Tensor) -> Checked:
        key = x.data_ptr()
        if key not in self._known:
            self._known[key] = _checked(x, codebook)
        return self._known[key]


@torch.no_grad()
def _checked(x: Tensor, codebook: Tensor) -> Checked:
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))[:_CHECKED_ROWS]
    codes = codebook.double().cpu()
    mean = codes.mean(0)
    codes, part = codes - mean, x.cpu()[rows].double() - mean
    half_norms = codes.square().sum(1) / 2
    chunks = part.split(max(1, _CHECKED_SCORES // len(codes)))
    found = [torch.addmm(half_norms, chunk, codes.T, alpha=-1).min(1) for chunk in chunks]
    nearest = torch.cat([f.indices for f in found])
    return Checked(rows, torch.cat([f.values for f in found]), nearest, part.norm(dim=1))


@torch.no_grad()
def check_case(reference: Reference, contender: Contender, indices: Tensor) -> Check:
    """Is every chosen code as near as the nearest, up to rounding, and does every average hold what it should?"""
    x, codebook = contender.x.detach(), contender.problem.codebook
    if indices.shape != x.shape[:1] or not bool(((indices >= 0) & (indices < len(codebook))).all()):
        return Check(False, f"indices of shape {list(indices.shape)} for {len(x)} vectors, or beyond the codebook")
    indices = indices.cpu()
    exact = reference.of(x, codebook)
    codes = codebook.double().cpu()
    mean = codes.mean(0)
    chosen = codes[indices[exact.rows]] - mean
    scores = (chosen / 2 - (x.cpu()[exact.rows].double() - mean)).mul_(chosen).sum(1)
    longer = torch.maximum(chosen.norm(dim=1), (codes[exact.nearest] - mean).norm(dim=1))
    gap = float((2 * (scores - exact.least) / (U * (exact.lengths + longer).square())).max())
    wrong = int((indices[exact.rows] != exact.nearest).sum())
    rows, limit = len(exact.rows), GAP * max(1.0, x.shape[1] / _GAP_WIDTH) ** 0.5
    facts = {"rows": rows, "differ": wrong, "differ_per_million": wrong / rows * 1e6, "worst_gap": gap}
    passed = gap <= limit
    summary = f"{wrong} of {rows} codes differ, farther by at most {max(gap, 0):.2g} u"
    averages = contender.averages()
    if averages is not None:
        error = averages_error(averages, x, codebook, indices)
        facts["averages_error"] = error
        passed = passed and error <= AVERAGES_ERROR
        summary += f", averages within {error:.1e}"
    return Check(passed, summary, facts)


@torch.no_grad()
def averages_error(averages: Averages, x: Tensor, codebook: Tensor, indices: Tensor) -> float:
    """Worst error of the buffers after one update from the codebook, relative to the magnitudes that went into each."""
    wide, start = x.double().cpu(), codebook.double().cpu()
    counts = torch.bincount(indices, minlength=len(start)).double()
    sums = torch.zeros_like(start).index_add_(0, indices, wide)
    magnitudes = torch.zeros_like(start).index_add_(0, indices, wide.abs())
    size = DECAY + (1 - DECAY) * counts
    total = DECAY * start + (1 - DECAY) * sums
    scale = DECAY * start.abs() + (1 - DECAY) * magnitudes
    smoothed = (size + EPS) / (size.sum() + len(size) * EPS) * size.sum()
    errors = (
        (averages.cluster_size.double().cpu() - size).abs() / size,
        (averages.embedding_sum.double().cpu() - total).abs() / scale,
        (averages.embedding.double().cpu() * smoothed[:, None] - total).abs() / scale,
    )
    return max(float(error.max()) for error in errors)


# --- what has to be done ------------------------------------------------------------------------------------------


def _unit(case: NearestCodeCase) -> str:
    """Where the product can be computed at best: float32 vectors can be screened at the rate of TF32."""
    if case.device == "cpu":
        return CPU_FLOAT32
    return "cuda bfloat16" if case.dtype == torch.bfloat16 else "cuda tf32"


def _work(case: NearestCodeCase) -> Work:
    return Work("product of vectors and codes", case.flops, unit=_unit(case))


def _measure_ceilings(case: NearestCodeCase, ceilings: Ceilings) -> None:
    rows, codes = min(case.batch, 1024), min(case.num_codes, 1024)
    if case.device == "cpu":
        ceilings.measure_gemm()
        ceilings.measure_tile(rows, case.code_dim, codes)
        return
    rows = min(case.batch, (1 << 28) // case.num_codes)
    for unit in GPU_UNITS:
        ceilings.measure_gpu(unit, rows, case.code_dim, case.num_codes)
        ceilings.measure_gpu(unit, 8192, 8192, 8192)


def _compare_with_forward(result: Result, others: list[Result]) -> None:
    """Note how much longer each takes with the EMA update than without."""
    if result.facts["what"] != "forward + EMA":
        return
    wanted = {**result.facts, "what": "forward"}
    forward = next((other for other in others if other.operation == result.operation and other.facts == wanted), None)
    for entry in result.entries if forward is not None else []:
        assert forward is not None
        other = forward.entry(entry.peer)
        if other is not None and entry.comparable and other.comparable:
            entry.facts["over_forward"] = entry.median / other.median
            entry.remarks = [*entry.remarks, f"{entry.median / other.median:.2f} x its forward"]


def measure_memory(case: NearestCodeCase, peer: str, *, small: bool = False) -> Memory:
    """Peak memory of a peer beyond inputs and codebook, in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", case.id, peer, *(["--small"] if small else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr}")
    return Memory(peer, json.loads(done.stdout.splitlines()[-1])["measured"])


def _gpu_memory(contender: Contender) -> Memory:
    """Peak of the GPU's allocator above what inputs, codebook and the buffers of all contenders take."""
    contender.prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run()
    synchronise(contender.case.device)
    return Memory(contender.name, torch.cuda.max_memory_allocated() - before)
