"""From a prior to a plan: a flat list of operations on per-position feature vectors, and when each can run.

Sampling goes through the grid in raster order. What an operation reads decides when its result is known:

- ``row``: only rows above, or things known beforehand (condition, label, place in the grid). Its values for a whole row
  are one library call when the row starts.
- ``left``: also columns left of the current one. All such operations of a position are independent of each other.
- ``here``: also features of the current position. These wait for one another.

A convolution is split along its taps: those on rows above are row work, whatever the rest is. One analysis covers every
prior; what the architectures look like is written down in :mod:`fastvq.sampling.lower`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastvq.errors import ArgumentError

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
        variant: ``elu``, ``concat_elu``, ``relu``; ``glu``, ``tanh``; ``background``, ``context``; ``strict``,
            ``inclusive``.
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


def schedule(ops: Sequence[Op], output: int, shape: tuple[int, int], num_codes: int) -> Plan:
    """Find out when each operation can run, and drop those that nothing needs."""
    ops, output = _prune(ops, output)
    timing: list[Timing] = []
    level: list[int] = []
    row_terms: dict[int, tuple[Term, ...]] = {}
    step_terms: dict[int, tuple[Term, ...]] = {}
    uniform: set[int] = set()
    for op in ops:
        timing.append("row")
        level.append(-1)
        if op.kind == "affine":
            in_row = [_is_row_tap(timing, op.index, term) for term in op.terms]
            parts = list(zip(op.terms, in_row, strict=True))
            row_terms[op.index] = tuple(p for term, keep in parts if (p := term.part(keep)))
            step_terms[op.index] = tuple(p for term, keep in parts if (p := term.part([not k for k in keep])))
        timing[-1], level[-1] = _when(op, ops, timing, level, step_terms)
        if _is_uniform(op, uniform):
            uniform.add(op.index)
    return Plan(
        tuple(ops),
        output,
        shape,
        num_codes,
        tuple(timing),
        tuple(level),
        _histories(ops, timing),
        row_terms,
        step_terms,
        frozenset(uniform),
    )


def _is_row_tap(timing: Sequence[Timing], index: int, term: Term) -> list[bool]:
    known = term.source < index and timing[term.source] == "row"
    return [known or dr < 0 for dr, _ in term.taps]


def _when(
    op: Op, ops: Sequence[Op], timing: Sequence[Timing], level: Sequence[int], step_terms: dict[int, tuple[Term, ...]]
) -> tuple[Timing, int]:
    """Timing and level of an operation whose sources are done."""
    if op.kind == "static":
        return "row", -1
    if op.kind == "lookup":
        return ("left", 0) if any(dr == 0 for dr, _ in op.taps) else ("row", -1)
    if op.kind == "affine":
        if not step_terms[op.index]:
            return "row", -1
        # A product needs the whole vector, so it waits for the level of its source to end.
        waits = [level[term.source] + 1 for term in step_terms[op.index] if (0, 0) in term.taps]
        return ("here", max(waits)) if waits else ("left", 0)
    if op.kind == "attention":
        read_here = op.sources if op.variant == "inclusive" else op.sources[:1]
        return "here", max(0, *(level[source] + 1 for source in read_here))
    if all(timing[source] == "row" for source in op.sources):
        return "row", -1
    # Element by element, a thread goes on with what it has computed itself; attention hands out work differently.
    return "here", max(level[source] + (ops[source].kind == "attention") for source in op.sources)


def _is_uniform(op: Op, uniform: set[int]) -> bool:
    if op.kind == "static":
        return op.variant == "label"
    sources = [*op.sources, *(term.source for term in op.terms)]
    return op.kind not in ("lookup", "attention") and bool(sources) and all(source in uniform for source in sources)


def _histories(ops: Sequence[Op], timing: Sequence[Timing]) -> dict[int, History]:
    taps: dict[int, set[Tap]] = {}
    for op in ops:
        for term in op.terms:
            if set(term.taps) != {(0, 0)}:
                taps.setdefault(term.source, set()).update(term.taps)
    return {
        source: History(
            above=max(-dr for dr, _ in read),
            left=max(0, *(-dc for _, dc in read)),
            right=max(0, *(dc for _, dc in read)),
        )
        for source, read in taps.items()
    }


def _prune(ops: Sequence[Op], output: int) -> tuple[list[Op], int]:
    needed: set[int] = set()
    waiting = [output]
    while waiting:
        index = waiting.pop()
        if index not in needed:
            needed.add(index)
            waiting += [*ops[index].sources, *(term.source for term in ops[index].terms)]
    renumbered = {old: new for new, old in enumerate(sorted(needed))}
    kept = [
        dataclasses.replace(
            ops[old],
            index=new,
            sources=tuple(renumbered[source] for source in ops[old].sources),
            terms=tuple(dataclasses.replace(term, source=renumbered[term.source]) for term in ops[old].terms),
        )
        for old, new in renumbered.items()
    ]
    return kept, renumbered[output]
