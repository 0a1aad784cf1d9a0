"""What those who look for the nearest code share: data, EMA buffers, a run's course, and the check against float64."""

from __future__ import annotations

import contextlib
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.cases import NearestCodeCase
from bench.clock import synchronise
from bench.harness import SHORT_SECONDS, Check, Memory, Peer, Result, Work, fresh_process, timed
from bench.machine import CPU_FLOAT32, GPU_UNITS, Ceilings, shared_cache_bytes
from bench.registry import LeftOutError

DECAY, EPS, COMMITMENT = 0.99, 1e-5, 0.25
# What would take more memory for N x K or more time per call is left out; on a CPU also what would take more than this
# part of the memory that is available just then.
MOST_BYTES = {"cpu": 9e9, "cuda": 32e9}
_MOST_AVAILABLE = 0.5
MOST_SECONDS = 30.0
# Forms are chosen on this many rows, and times of slow peers are estimated from them.
TRIAL_ROWS = 8192
_MOST_INPUTS = 64


def most_bytes(device: str) -> float:
    """Memory that a contender may use for N x K."""
    limit = MOST_BYTES[device]
    available = available_memory() if device == "cpu" else None
    return limit if available is None else min(limit, _MOST_AVAILABLE * available)


def available_memory() -> int | None:
    """Bytes that can be had without anything else being pushed out; None where it is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


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


def add_up(x: Tensor, indices: Tensor, num_codes: int, way: str) -> tuple[Tensor, Tensor]:
    """Counts [K] and sums [K, D] of the vectors of each code."""
    counts = torch.bincount(indices, minlength=num_codes)
    sums = torch.zeros(num_codes, x.shape[1], device=x.device)
    x = x.float()
    if way == "index_add_":
        return counts, sums.index_add_(0, indices, x)
    return counts, sums.scatter_add_(0, indices[:, None].expand_as(x), x)


@dataclass
class Averages:
    """What an EMA codebook consists of: N_i [K], m_i [K, D] and the codes e_i [K, D]."""

    cluster_size: Tensor
    embedding_sum: Tensor
    embedding: Tensor

    @staticmethod
    def of(codebook: Tensor) -> Averages:
        return Averages(codebook.new_ones(codebook.shape[0]), codebook.clone(), codebook.clone())

    def reset(self, codebook: Tensor) -> None:
        self.cluster_size.fill_(1)
        self.embedding_sum.copy_(codebook)
        self.embedding.copy_(codebook)

    def update(self, counts: Tensor, sums: Tensor) -> None:
        """van den Oord et al. 2017, appendix A.1, with Laplace smoothing."""
        self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - DECAY)
        self.embedding_sum.lerp_(sums, 1 - DECAY)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + EPS) * (total / (total + len(counts) * EPS))
        torch.div(self.embedding_sum, smoothed[:, None], out=self.embedding)


@dataclass
class Checked:
    """Some rows of an x [N, D], with the least scores and lengths of each in float64, centred."""

    rows: Tensor
    least: Tensor
    nearest: Tensor
    lengths: Tensor


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


@registry.problem("nearest code", "quantiser module")
class NearestCode(registry.Problem):
    """A case's data, made once for all.

    Attributes:
        inputs: different x [N, D] that runs take in turn, together larger than the shared cache if a few of them are.
    """

    legend = (
        "nearest code: batch is the number N of vectors; the floor is 2 N K D operations, nothing else.",
        "Check, in float64, of a sample of rows: no chosen code is farther than the nearest one by more than",
        "16 u (|x| + |c|)^2, u = 2^-24, c the longer of the two (for D > 256 sqrt(D / 256) times that); with EMA also",
        "the averages of all.",
        "time/gemm only: the product alone, written to memory in full where that is less than 3 GB.",
        "With EMA fastvq and vector-quantize-pytorch work out the commitment loss too, the latter the chosen vectors.",
        "All threads. Memory: beyond inputs and codebook.",
        "quantiser module: training forward for inputs that need a gradient: codes, straight-through vectors,",
        "commitment loss, EMA update. Floor, check, threads and memory as for nearest code.",
    )
    case: NearestCodeCase

    def __init__(
        self,
        case: NearestCodeCase,
        *,
        tuned: bool = True,
        ceilings: Ceilings | None = None,
        inputs: int | None = None,
    ) -> None:
        super().__init__(case, tuned=tuned, ceilings=ceilings)
        size = case.batch * case.code_dim * case.dtype.itemsize
        count = inputs or max(2, min(_MOST_INPUTS, math.ceil(2 * shared_cache_bytes() / size)))
        self.inputs, self.codebook = case.inputs(count)
        for x in self.inputs:
            # A quantiser in training gets the output of an encoder.
            x.requires_grad_(case.what == "module")
        # Where the product can be computed at best: float32 vectors can be screened at the rate of TF32.
        unit = CPU_FLOAT32
        if case.device == "cuda":
            unit = "cuda bfloat16" if case.dtype == torch.bfloat16 else "cuda tf32"
        self.work = [Work("product of vectors and codes", case.flops, unit=unit)]
        self.facts = {"shape": [case.batch, case.num_codes, case.code_dim], "what": case.what, "dtype": str(case.dtype)}
        self.facts |= {"device": case.device, "inputs": len(self.inputs)}
        self._known: dict[int, Checked] = {}

    def measure_ceilings(self) -> None:
        case = self.case
        rows, codes = min(case.batch, 1024), min(case.num_codes, 1024)
        if case.device == "cpu":
            self.ceilings.measure_gemm()
            self.ceilings.measure_tile(rows, case.code_dim, codes)
            return
        rows = min(case.batch, (1 << 28) // case.num_codes)
        for unit in GPU_UNITS:
            self.ceilings.measure_gpu(unit, rows, case.code_dim, case.num_codes)
            self.ceilings.measure_gpu(unit, 8192, 8192, 8192)

    def best(self, forms: Mapping[str, Callable[[], object]]) -> str:
        """Name of the quickest form; of the first where nothing is tuned."""
        names = list(forms)
        if not self.tuned or len(names) == 1:
            return names[0]
        times = {name: min(timed(forms[name], device=self.case.device) for _ in range(4)) for name in names}
        return min(names, key=times.__getitem__)

    @functools.cached_property
    def add(self) -> str:
        """The quicker way to add vectors up by code."""
        x = self.inputs[0].detach().float()
        indices = torch.randint(self.case.num_codes, (x.shape[0],), device=x.device)
        ways = ("index_add_", "scatter_add_")
        return self.best({way: functools.partial(add_up, x, indices, self.case.num_codes, way) for way in ways})

    @torch.no_grad()
    def check(self, contender: Contender, output: Any) -> Check:
        """Is every chosen code as near as the nearest, up to rounding, and does every average hold what it should?"""
        indices: Tensor = output
        x, codebook = contender.x.detach(), self.codebook
        if indices.shape != x.shape[:1] or not bool(((indices >= 0) & (indices < len(codebook))).all()):
            return Check(False, f"indices of shape {list(indices.shape)} for {len(x)} vectors, or beyond the codebook")
        indices = indices.cpu()
        exact = self._exact(x)
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

    def _exact(self, x: Tensor) -> Checked:
        """Kept for inputs that several contenders worked on."""
        key = x.data_ptr()
        if key not in self._known:
            self._known[key] = _checked(x, self.codebook)
        return self._known[key]

    def finish(self, result: Result, others: Sequence[Result]) -> None:
        """Note how much longer each takes with the EMA update than without."""
        if self.case.what != "forward + EMA":
            return
        wanted = {**result.facts, "what": "forward"}
        forward = next(
            (other for other in others if other.operation == result.operation and other.facts == wanted), None
        )
        for entry in result.entries if forward is not None else []:
            assert forward is not None
            other = forward.entry(entry.peer)
            if other is not None and entry.comparable and other.comparable and "over_forward" not in entry.facts:
                entry.facts["over_forward"] = entry.median / other.median
                entry.remarks = [*entry.remarks, f"{entry.median / other.median:.2f} x its forward"]

    def memory(self, contenders: Sequence[Contender]) -> list[Memory]:
        chosen = [one for one in contenders if one.name in self.case.memory]
        return [
            _gpu_memory(one) if self.case.device == "cuda" else measure_memory(self.case, one.name) for one in chosen
        ]


class Contender(registry.Contender):
    """Something that does a case's work, one input per run.

    Attributes:
        bytes_per_score: of memory for each pair of a vector and a code, at the peak.
        x: what the last run worked on.
    """

    bytes_per_score = 0.0

    def __init__(self, problem: NearestCode) -> None:
        super().__init__()
        self.problem, self.case = problem, problem.case
        self.x = problem.inputs[0]
        self._next = 0

    def warm(self) -> list[Peer]:
        size, limit = self.bytes_per_score * self.case.scores, most_bytes(self.case.device)
        if size > limit:
            raise LeftOutError(f"about {size / 1e9:.0f} GB for N x K, limit {limit / 1e9:.0f}")
        self.tune()
        expected = 0.0
        if self.problem.tuned:
            expected = self.pace()
            if expected > MOST_SECONDS and self.name != "fastvq":
                raise LeftOutError(f"about {expected:.0f} s per call, limit {MOST_SECONDS:.0f}")
            if expected < SHORT_SECONDS:
                self.prepare()
                expected = timed(self.run, device=self.case.device)
        return [Peer(self.name, self.run, expected, self.problem.threads, self.prepare, self.case.device)]

    def tune(self) -> None:
        """Choose the best form; not timed."""

    def pace(self) -> float:
        """Seconds that a run is thought to take."""
        part = self.x[:TRIAL_ROWS]
        return min(timed(self.step, part, device=self.case.device) for _ in range(2)) * len(self.x) / len(part)

    def prepare(self) -> None:
        """Take the next input and start from the first codebook again."""
        self.x = self.problem.inputs[self._next % len(self.problem.inputs)]
        self._next += 1
        averages = self.averages()
        if averages is not None:
            averages.reset(self.problem.codebook)

    def run(self) -> Tensor:
        """Indices of the input taken last."""
        return self.step(self.x)

    @abstractmethod
    def step(self, x: Tensor) -> Tensor:
        """Index of the nearest code [N], and the update where the case has one."""

    @abstractmethod
    def averages(self) -> Averages | None:
        """After the last run; None where there are none."""


Find = Callable[[Tensor, Tensor], Tensor]


class Search(Contender):
    """One who finds indices [N] from x [N, D] and a codebook [K, D]; the EMA update is the same code for all.

    Attributes:
        forms: by name; the quickest is taken.
        rows: of a form, the number of vectors below which it cannot be tried.
    """

    def __init__(
        self, problem: NearestCode, forms: Mapping[str, Find], bytes_per_score: float = 0.0, rows: Sequence[int] = ()
    ) -> None:
        super().__init__(problem)
        self.forms, self.bytes_per_score = forms, bytes_per_score
        self.rows = dict(zip(forms, rows or [0] * len(forms), strict=True))
        self.form = next(iter(forms))
        self._averages = Averages.of(problem.codebook) if self.case.what != "forward" else None

    def averages(self) -> Averages | None:
        return self._averages

    @torch.no_grad()
    def tune(self) -> None:
        times = dict.fromkeys(self.forms, 0.0)
        for name in self.forms if self.problem.tuned and len(self.forms) > 1 else ():
            part = self._trial(name)
            run = functools.partial(self.forms[name], part, self.problem.codebook)
            run()
            times[name] = min(timed(run, device=self.case.device) for _ in range(3)) / len(part)
        self.form = min(self.forms, key=times.__getitem__)
        if self.form:
            self.remarks = [self.form]

    def pace(self) -> float:
        part = self._trial(self.form)
        return min(timed(self.step, part, device=self.case.device) for _ in range(2)) * len(self.x) / len(part)

    def _trial(self, form: str) -> Tensor:
        return self.problem.inputs[0][: max(self.rows[form], TRIAL_ROWS)]

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            find = self.forms[self.form]
            if self._averages is None:
                return find(x, self.problem.codebook)
            indices = find(x, self._averages.embedding)
            self._averages.update(*add_up(x, indices, self.case.num_codes, self.problem.add))
            return indices


def measure_memory(case: NearestCodeCase, peer: str, *, small: bool = False) -> Memory:
    """Peak memory of a peer beyond inputs and codebook, in a process of its own."""
    return fresh_process(peer, case.id, peer, small=small)


def _gpu_memory(contender: Contender) -> Memory:
    """Peak of the GPU's allocator above what inputs, codebook and the buffers of all contenders take."""
    contender.prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run()
    synchronise(torch.device(contender.case.device))
    return Memory(contender.name, torch.cuda.max_memory_allocated() - before)
