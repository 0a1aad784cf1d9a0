"""What kernels for whole steps work out of a plan: everything along a front, or what a row knows before it starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastvq.sampling.plan.form import Op, Plan, Term

HERE = (0, 0)
_BY_ELEMENT = ("activation", "add", "gate")


@dataclass(frozen=True)
class Work:
    """The operations of a plan as kernels see them.

    Attributes:
        ops: by index. What is known beforehand is ``static``, with the sources that it follows from if there are any;
            operations that are not worked out here are as the plan has them, and only their past is read.
        made: those that are worked out.
        wanted: of these, the ones whose vectors others read.
        starts: of these, what the plan itself goes on with at each position.
        raster: a step is a row of every sample; otherwise one position of every row along the front.
    """

    plan: Plan
    ops: tuple[Op, ...]
    made: frozenset[int]
    wanted: frozenset[int]
    starts: frozenset[int]
    raster: bool

    @classmethod
    def front(cls, plan: Plan) -> Work:
        made = frozenset(op.index for op in plan.ops if op.kind != "static")
        return cls(plan, plan.ops, made, frozenset({plan.output}), frozenset(), raster=False)

    @classmethod
    def rows(cls, plan: Plan) -> Work:
        """What the row phase has: row operations, and what operations of the steps start from.

        What follows element by element from what is known beforehand is known beforehand as well.
        """
        ops: list[Op] = []
        by_row: set[int] = set()
        starts: set[int] = set()
        for op in plan.ops:
            if plan.timing[op.index] == "row":
                by_element = op.kind in _BY_ELEMENT and all(ops[source].kind == "static" for source in op.sources)
                found = dataclasses.replace(op, kind="static") if by_element else op
                by_row.update([op.index] if found.kind != "static" else [])
            else:
                found = _start(plan, op)
                starts.update([op.index] if found is not op else [])
            ops.append(found)
        read = {source for op in plan.step_ops() for source in op.sources}
        wanted = starts | (by_row & read)
        return cls(plan, tuple(ops), frozenset(by_row | starts), frozenset(wanted), frozenset(starts), raster=True)

    @property
    def shared(self) -> list[int]:
        """Operations whose vectors the steps of a row read several of at a time, which must lie without gaps."""
        return [index for index in self.plan.history if self.raster and index not in self.made]

    def waits(self, term: Term) -> int:
        """How many taps, the last ones, read what is worked out in the same step."""
        if term.source not in self.made:
            return 0
        return sum(dr == 0 and (self.raster or dc == 0) for dr, dc in term.taps)


def _start(plan: Plan, op: Op) -> Op:
    """What an operation of the steps starts from, as an operation; itself if that is its bias alone or nothing."""
    if plan.row_terms.get(op.index):
        return dataclasses.replace(op, terms=plan.row_terms[op.index])
    above = [index for index, (dr, _) in enumerate(op.taps) if dr < 0]
    if not above:
        return op
    assert op.weight is not None
    return dataclasses.replace(op, taps=tuple(op.taps[index] for index in above), weight=op.weight[above])


def why_no_front(plan: Plan) -> str | None:
    """Why a plan cannot be run along a front by kernels for whole steps, or None."""
    return plan.raster_reason if plan.skew is None else _why_not(Work.front(plan))


def why_no_rows(plan: Plan) -> str | None:
    """Why what a row knows before it starts cannot be worked out by kernels for whole rows, or None."""
    return _why_not(Work.rows(plan))


def _why_not(work: Work) -> str | None:
    read = {source for index in work.made for source in work.ops[index].sources}
    if any(work.ops[source].kind == "static" for source in read):
        return "it reads what is known beforehand element by element"
    return None
