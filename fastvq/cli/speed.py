"""One prior sampled twice, naively and as it is by default: the same codes, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvq.sampling import Pipeline, choose_engine, sample

# Grids that are asked of the naive engine at most.
_MOST = 4096
# Of which the quickest counts: the first ones do more than later ones.
_PASSES = 3


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        shape: of the codes that were drawn, [n, H, W].
        engine: that is taken by default.
        naive, default: seconds.
        differing: how many of the codes are not the same.
    """

    shape: tuple[int, int, int]
    engine: str
    naive: float
    default: float
    differing: int

    def __str__(self) -> str:
        n, height, width = self.shape
        ratio = self.naive / self.default
        return (
            f"{n} grid{'s' if n > 1 else ''} of {height} x {width} codes: naive {self.naive:.3g} s, {self.engine} "
            f"{self.default:.3g} s, {ratio:.{0 if ratio >= 10 else 1}f} times as fast; "
            f"{self.differing} of {n * height * width} codes differ"
        )


def compare_engines(pipeline: Pipeline, seconds: float, *, seed: int, progress: bool) -> Comparison:
    """Sample the finest prior naively and by default, as many grids as the naive engine draws in about ``seconds``.

    At least one grid is drawn, and the codes of both are compared.
    """
    prior, n = pipeline.priors[-1], 1
    while True:
        given = _given(pipeline, n, seed)
        naive, slow = _timed(lambda: sample(prior, n, **given, engine="naive", progress=progress))  # noqa: B023
        if naive > seconds / 2 or n == _MOST:
            break
        # Several grids at a time take less than one by one.
        n = min(_MOST, max(n + 1, int(n * seconds / naive)))
    # The first call makes a plan of the prior, which later ones find.
    sample(prior, 1, **_given(pipeline, 1, seed))
    default, fast = _timed(lambda: sample(prior, n, **given))
    engine, _ = choose_engine("auto", prior)
    return Comparison((n, *prior.config.shape), engine, naive, default, int((fast != slow).sum()))


def naive_seconds(pipeline: Pipeline) -> float:
    """About what the naive engine takes for a grid of the finest prior: a pass over the rows so far for each code."""
    prior = pipeline.priors[-1]
    height, width = prior.config.shape
    given = _given(pipeline, 1, 0)
    codes = torch.zeros(1, height, width, dtype=torch.int64, device=next(prior.parameters()).device)

    def one_pass() -> Tensor:
        with torch.no_grad():
            logits: Tensor = prior(codes, given["condition"], given["label"])
        return logits

    return min(_timed(one_pass)[0] for _ in range(_PASSES)) * width * (height + 1) / 2


def _given(pipeline: Pipeline, n: int, seed: int) -> dict[str, Any]:
    """Arguments of sampling the finest prior: codes of the levels above, classes in turn."""
    labels = pipeline.labels(range(n))
    above: list[Tensor] = []
    for prior in pipeline.priors[:-1]:
        above.append(sample(prior, n, condition=above or None, label=labels, seed=seed))
    return {"condition": above or None, "label": labels, "seed": seed}


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds until what ``work`` returns is there, and that."""
    began = time.perf_counter()
    found = work()
    if found.is_cuda:
        torch.cuda.synchronize(found.device)
    return time.perf_counter() - began, found
