"""When each operation of a plan can run, and what of its past is read: functions of the operations alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastvq.sampling.plan.form import History, Op, Plan, Tap, Term, Timing, extent


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
    skew, raster_reason = _skew(ops, shape)
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
        skew,
        raster_reason,
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
        return extent(op.variant) == "label"
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


def _skew(ops: Sequence[Op], shape: tuple[int, int]) -> tuple[int | None, str | None]:
    """The least skew of a front along which the grid can be sampled, or None and the reason for raster order.

    Operations are evaluated where and when a position is sampled, so of the rows above they may read what was sampled
    before: a tap (-d, e) asks for c + e + skew * (r - d) < c + skew * r. That covers reading through any number of
    layers, each of which keeps to it.
    """
    width = shape[1]
    taps = {tap for op in ops for read in (op.taps, *(term.taps for term in op.terms)) for tap in read}
    if any(op.kind == "attention" for op in ops):
        return None, "its attention reads all positions before"
    if any(dr == 0 and dc > 0 for dr, dc in taps):
        return None, "it reads features to the right in a position's own row"
    skew = max((min(dc, width - 1) // -dr + 1 for dr, dc in taps if dr < 0), default=1)
    skew = max(1, skew)
    if min(shape) == 1 or skew >= width:
        return None, "nothing is to be gained on a grid this small"
    return skew, None


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
