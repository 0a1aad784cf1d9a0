"""From a prior to a plan: a flat list of operations on per-position feature vectors, and when each can run.

Sampling goes through each row from left to right, and through the rows along a front
(:mod:`fastvq.sampling.plan.front`) or one after the other. What an operation reads decides when its result is known:

- ``row``: only rows above, or things known beforehand (condition, label, place in the grid). Its values for a
  whole row, or for the tiles that the front has come to, are one library call when these start.
- ``left``: also columns left of the current one. All such operations of a position are independent of each other.
- ``here``: also features of the current position. These wait for one another.

A convolution is split along its taps: those on rows above are row work, whatever the rest is. One analysis covers every
prior (:mod:`fastvq.sampling.plan.analysis`); what the architectures look like is written down in a file each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastvq.errors import ArgumentError
from fastvq.sampling.plan.front import Front

Kind = Literal["lookup", "affine", "static", "activation", "add", "gate", "attention"]
Timing = Literal["row", "left", "here"]
Tap = tuple[int, int]


@dataclass(frozen=True)
class Term:
    """One convolution inside an affine operation: the sum over taps t of source[r + dr, c + dc] @ weight[t].

    Attributes:
        source: index of the operation whose output is read.
        taps: pairs (dr, dc) with dr <= 0 that fill a rectangle, row by row.
        weight: [T, C_in, C_out].
    """

    source: int
    taps: tuple[Tap, ...]
    weight: Tensor

    def part(self, keep: Sequence[bool]) -> Term | None:
        """The term with some of its taps."""
        chosen = [index for index, wanted in enumerate(keep) if wanted]
        if len(chosen) == len(self.taps):
            return self
        if not chosen:
            return None
        # Rows come one after the other, so the taps lie together and a view does: weights are most of the memory.
        first, last = chosen[0], chosen[-1] + 1
        assert last - first == len(chosen)
        return Term(self.source, self.taps[first:last], self.weight[first:last])


@dataclass(frozen=True)
class Op:
    """One operation. At a position it reads operations of lower index, elsewhere any.

    Attributes:
        kind: ``lookup`` (sum over taps of a learned vector per code), ``affine`` (terms plus bias), ``static`` (known
            beforehand), ``activation``, ``add``, ``gate`` (the halves a, b of a vector become a * sigmoid(b) or
            tanh(a) * sigmoid(b)), ``attention``.
        channels: length of the output vector.
        sources: inputs at the same position: of activation, add and gate; query, key and value of attention.
        variant: ``elu``, ``concat_elu``, ``relu``; ``glu``, ``tanh``; ``strict``, ``inclusive``; of static operations
            their name, see :func:`extent`.
        terms, bias: of affine operations; ``taps``, ``weight`` [T, K, C] and ``bias`` of lookups; ``heads`` of
            attention.
    """

    index: int
    kind: Kind
    channels: int
    sources: tuple[int, ...] = ()
    variant: str = ""
    terms: tuple[Term, ...] = ()
    taps: tuple[Tap, ...] = ()
    weight: Tensor | None = None
    bias: Tensor | None = None
    heads: int = 0


def extent(name: str) -> str:
    """What a static operation of this name differs by: ``label`` (samples), ``context`` (samples and positions), or
    anything else (positions). There may be several of each, told apart by what follows a dot: ``label.1``.
    """
    return name.partition(".")[0]


def static_places(op: Op, positions: int) -> int:
    """How many vectors of a static operation a sample has of its own."""
    return {"context": positions, "label": 1}.get(extent(op.variant), 0)


@dataclass(frozen=True)
class History:
    """How much of an operation's past is read: ``above`` rows, ``left`` and ``right`` columns."""

    above: int
    left: int
    right: int


@dataclass(frozen=True)
class Plan:
    """Operations and their schedule.

    Attributes:
        ops: in an order in which they can be evaluated.
        output: index of the operation that gives the logits.
        shape, num_codes: of the grid.
        timing: of each operation.
        level: of each operation of the step phase (-1 for row work). Operations of one level need no waiting for each
            other; between levels the parts of a vector computed by different threads have to meet.
        history: by operation index, of those whose past is read.
        row_terms, step_terms: each affine operation's terms, split by phase.
        uniform: operations that are the same at all positions of a sample.
        skew: positions with the same column + skew * row can be sampled together, and those with a smaller sum before;
            None if only raster order does, for ``raster_reason``.
        context_weights: numbers in the convolutions that make static values of a condition; they are no part of the
            plan.
    """

    ops: tuple[Op, ...]
    output: int
    shape: tuple[int, int]
    num_codes: int
    timing: tuple[Timing, ...]
    level: tuple[int, ...]
    history: dict[int, History]
    row_terms: dict[int, tuple[Term, ...]]
    step_terms: dict[int, tuple[Term, ...]]
    uniform: frozenset[int]
    skew: int | None
    raster_reason: str | None
    context_weights: int = 0

    @functools.cached_property
    def remembered(self) -> dict[Hashable, Any]:
        """What has been worked out about this plan alone, by whatever it was worked out for."""
        return {}

    @property
    def num_levels(self) -> int:
        """Levels per position, the draw included."""
        return max(self.level) + 2

    def step_ops(self) -> Iterator[Op]:
        """Operations of the step phase in the order in which they run."""
        steps = [op for op in self.ops if self.timing[op.index] != "row"]
        return iter(sorted(steps, key=lambda op: (self.level[op.index], op.index)))

    def row_ops(self) -> Iterator[Op]:
        return (op for op in self.ops if self.timing[op.index] == "row")

    def front(self, tile: int) -> Front:
        """The order of sampling with tiles of that many columns; those as wide as the grid are raster order.

        Raises:
            ArgumentError: a tile wider than the grid, or a narrower one where only raster order samples this prior.
        """
        width = self.shape[1]
        if tile > width:
            raise ArgumentError(f"tile: expected 1 to the width of the grid, {width}, got {tile}")
        if self.skew is None and tile < width:
            raise ArgumentError(f"tile: expected {width}, the width of the grid, got {tile}: {self.raster_reason}")
        return Front(self.shape, width if self.skew is None else self.skew, tile)


def require_finite(plan: Plan) -> None:
    """Refuse weights that can only give NaN. A bias of -inf is one way to exclude a code.

    Raises:
        ArgumentError: there are some.
    """
    for op in plan.ops:
        weights = [term.weight for term in op.terms] + ([] if op.weight is None else [op.weight])
        biases = [] if op.bias is None else [op.bias]
        if not all(bool(w.isfinite().all()) for w in weights) or not all(bool((b < math.inf).all()) for b in biases):
            raise ArgumentError("prior: its weights hold NaN or infinite values")
