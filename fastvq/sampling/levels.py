"""Codes of all levels, drawn from the top down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.sampling.api import Run, ends
from fastvq.sampling.engines import warn_slow
from fastvq.sampling.known import Known
from fastvq.sampling.noise import uniforms
from fastvq.sampling.request import Settings, assemble

# What a callback is given: rows done, and the codes of each level.
LevelsCallback = Callable[[int, tuple[Tensor, ...]], object]


@dataclass(frozen=True)
class Levels:
    """How the codes of all levels will be drawn, decided before anything is.

    Attributes:
        runs: of each level, top first; all with the same micro-batch.
        settings: of each level.
    """

    runs: tuple[Run, ...]
    settings: tuple[Settings, ...]

    @property
    def micro_batch(self) -> int:
        return self.runs[0].micro_batch

    def warn_slow(self, stacklevel: int, *, first: int = 0) -> None:
        """Say once what takes the naive engine from level ``first`` on; ``stacklevel`` 1 is the caller's line."""
        warn_slow([run.slow for run in self.runs[first:] if run.slow is not None], stacklevel=stacklevel + 1)

    def draw(
        self,
        n: int,
        *,
        seed: int,
        start: int = 0,
        labels: Tensor | None = None,
        known: Sequence[Known] = (),
        progress: bool = False,
        callback: LevelsCallback | None = None,
    ) -> tuple[Tensor, ...]:
        """Codes of samples ``start .. start + n - 1``: int64 [n, h, w] for each level, top first.

        Args:
            known: codes of the first levels.
            callback: see :meth:`Pipeline.sample`.
        """
        codes: tuple[Tensor, ...] = ()
        before, total, stopped = 0, 0, False

        def told(rows: int, grids: Tensor) -> bool:
            nonlocal total, stopped
            assert callback is not None
            total = before + rows
            stopped = ends(callback(total, (*codes, grids)))
            return not stopped

        for level, (run, given) in enumerate(zip(self.runs, self.settings, strict=True)):
            config = run.prior.config
            there, where = (known[level].codes, known[level].where) if level < len(known) else (None, None)
            if there is not None and where is None:
                codes = (*codes, there.to(next(run.prior.parameters()).device))
                continue
            if stopped:
                shape, device = (n, *config.shape), next(run.prior.parameters()).device
                codes = (*codes, torch.full(shape, -1, dtype=torch.int64, device=device))
                continue
            noise = uniforms(seed, start, n, config.shape, level=config.level)
            request = assemble(run.prior, given, noise, codes, labels, there, where)
            drawn = run.draw(request, start, progress=progress, callback=None if callback is None else told)
            codes, before = (*codes, drawn), total
        return codes

    def log_probabilities(self, codes: tuple[Tensor, ...], labels: Tensor | None) -> tuple[Tensor, ...]:
        """Of the codes of each level, see :func:`fastvq.sample`."""
        found = []
        for level, run in enumerate(self.runs):
            above = [grid.clamp(min=0) for grid in codes[:level]]  # where these are missing, so are those below
            found.append(run.log_probabilities(above, labels, codes[level]))
        return tuple(found)
