"""What those who look for the nearest code in the benchmark have in common: data, EMA buffers, and a run's course."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import NearestCodeCase
from bench.harness import timed
from bench.machine import shared_cache_bytes

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


def return_freed_memory() -> None:
    """Give what the C library keeps of freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Problem:
    """A case's data, made once for all contenders.

    Attributes:
        inputs: different x [N, D] that runs take in turn, together larger than the shared cache if a few of them are.
        tuned: False: contenders take their first form without trying others.
    """

    def __init__(self, case: NearestCodeCase, *, tuned: bool = True, inputs: int | None = None) -> None:
        self.case, self.tuned = case, tuned
        self.threads = torch.get_num_threads()
        size = case.batch * case.code_dim * case.dtype.itemsize
        count = inputs or max(2, min(_MOST_INPUTS, math.ceil(2 * shared_cache_bytes() / size)))
        self.inputs, self.codebook = case.inputs(count)
        for x in self.inputs:
            # A quantiser in training gets the output of an encoder.
            x.requires_grad_(case.what == "module")

    def trial(self) -> Tensor:
        """The first rows."""
        return self.inputs[0][:TRIAL_ROWS]

    def best(self, forms: Mapping[str, Callable[[], object]]) -> str:
        """Name of the quickest form; of the first where nothing is tuned."""
        names = list(forms)
        if not self.tuned:
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


class Contender(ABC):
    """Something that does a case's work, one input per run.

    Attributes:
        bytes_per_score: of memory for each pair of a vector and a code, at the peak.
        x: what the last run worked on.
    """

    exact = True
    whole = True
    bytes_per_score = 0.0

    def __init__(self, name: str, problem: Problem) -> None:
        self.name, self.problem, self.case = name, problem, problem.case
        self.remarks: list[str] = []
        self.x = problem.inputs[0]
        self._next = 0
        self._averages = Averages.of(problem.codebook) if self.case.what != "forward" else None

    @staticmethod
    def missing(case: NearestCodeCase) -> str | None:
        """Why it cannot take part, or None."""
        return None

    def reason(self) -> str | None:
        """Why it should not run this case, or None."""
        size = self.bytes_per_score * self.case.scores
        limit = most_bytes(self.case.device)
        return f"about {size / 1e9:.0f} GB for N x K, limit {limit / 1e9:.0f}" if size > limit else None

    def tune(self) -> None:  # noqa: B027
        """Choose the best form; not timed."""

    def pace(self) -> float:
        """Seconds that a run is thought to take."""
        part = self.x[:TRIAL_ROWS]
        return min(timed(self.step, part, device=self.case.device) for _ in range(2)) * len(self.x) / len(part)

    def prepare(self) -> None:
        """Take the next input and start from the first codebook again."""
        self.x = self.problem.inputs[self._next % len(self.problem.inputs)]
        self._next += 1
        self.reset()

    def reset(self) -> None:
        if self._averages is not None:
            self._averages.reset(self.problem.codebook)

    def run(self) -> Tensor:
        """Indices of the input taken last."""
        return self.step(self.x)

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self._averages is None:
                return self.search(x, self.problem.codebook)
            indices = self.search(x, self._averages.embedding)
            self._averages.update(*add_up(x, indices, self.case.num_codes, self.problem.add))
            return indices

    @abstractmethod
    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Index of the nearest code [N]."""

    def averages(self) -> Averages | None:
        """After the last run; None where there are none."""
        return self._averages
