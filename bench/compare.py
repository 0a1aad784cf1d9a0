"""Two runs of the same benchmarks: ``python -m bench.compare BEFORE.json AFTER.json``.

Files are those of ``--results``, of pytest-benchmark's ``--benchmark-json``, ``--benchmark-autosave`` and
``--benchmark-save``, or of ``bench.gpu.sampler``. Every peer of every case that is in both has a row: medians with the
middle half of the rounds, and how many times as fast it is after.

A gain or a loss is claimed only where the rounds lie apart: of 8 rounds or more their middle halves, of 3 to 7 all of
them; never of fewer. It is never claimed where a check failed or was not made, of modes that are not exact, of parts of
an operation, or of extrapolated times. The runs were not taken in turns: what the machine did in between counts as
change. How far peers of other libraries moved is said at the end: less than that is nothing.

Runs of different machines (processor, vectors, caches, cores, threads, GPUs), or at full and at reduced size, are not
compared. Other versions of PyTorch or Python are named.

Exit status: 0 nothing was lost; 1 a loss is claimed of a peer of this package, or a check that passed before fails;
2 the files cannot be read or compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.files import Session, load
from bench.harness import Entry
from bench.recorded import instruction_sets, is_own
from bench.report import aligned
from bench.units import number, seconds

# From so many rounds on a few slow ones do not count.
MANY_ROUNDS, LEAST_ROUNDS = 8, 3
GAIN, LOSS, FAILS = "faster", "slower", "FAILS NOW"
_NO_CLAIM = ""


class DifferentError(ValueError):
    """Two runs cannot be compared."""


class Spread(NamedTuple):
    """Rounds of a peer: how many, all of them, and their middle half, in seconds."""

    rounds: int
    least: float
    lower: float
    upper: float
    most: float

    @classmethod
    def of(cls, entry: Entry) -> Spread:
        kept = entry.facts.get("statistics")
        if kept:
            return cls(kept["rounds"], kept["min"], kept["q1"], kept["q3"], kept["max"])
        times = entry.seconds
        lower, _, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return cls(len(times), min(times), lower, upper, max(times))

    def range(self, rounds: int) -> tuple[float, float]:
        """What must lie apart from the other's, of the run with fewer rounds ``rounds``."""
        return (self.lower, self.upper) if rounds >= MANY_ROUNDS else (self.least, self.most)


class Row(NamedTuple):
    """A peer of a case in both runs; ``verdict`` is a claim, or why there is none."""

    operation: str
    case: str
    batch: int
    before: Entry
    after: Entry
    verdict: str


def verdict(before: Entry, after: Entry) -> str:
    """`GAIN`, `LOSS`, `FAILS`, "" where the rounds overlap, or why nothing can be said."""
    for when, entry in (("before", before), ("after", after)):
        if not entry.whole:
            return "part of the operation"
        if not entry.exact:
            return "not exact"
        if entry.check is None:
            return f"not checked {when}"
    assert before.check is not None
    assert after.check is not None
    if not after.check.passed:
        return FAILS if before.check.passed else "fails in both"
    if not before.check.passed:
        return "failed before"
    if before.extrapolated or after.extrapolated:
        return "extrapolated"
    spreads = Spread.of(before), Spread.of(after)
    rounds = min(spread.rounds for spread in spreads)
    if rounds < LEAST_ROUNDS:
        return f"{rounds} round{'' if rounds == 1 else 's'}"
    (least_before, most_before), (least_after, most_after) = (spread.range(rounds) for spread in spreads)
    if most_after < least_before:
        return GAIN
    return LOSS if least_after > most_before else _NO_CLAIM


def compare(before: Session, after: Session) -> list[Row]:
    """A row for every peer of every case that both have.

    Raises:
        DifferentError: the machines differ, or the sizes.
    """
    _same_machine(before, after)
    rows = []
    then = {(one.operation, one.case, one.batch): one for one in before.results}
    for result in after.results:
        earlier = then.get((result.operation, result.case, result.batch))
        for entry in result.entries if earlier is not None else ():
            if earlier is not None and (other := earlier.entry(entry.peer)) is not None:
                where = result.operation, result.case, result.batch
                rows.append(Row(*where, other, entry, verdict(other, entry)))
    return rows


def _same_machine(before: Session, after: Session) -> None:
    if before.quick != after.quick:
        sizes = ["reduced" if session.quick else "full" for session in (before, after)]
        raise DifferentError(f"expected runs at the same size, got one at {sizes[0]} and one at {sizes[1]} size")
    facts = [
        {
            "processor": session.machine["cpu"],
            "instruction sets": ", ".join(instruction_sets(session)),
            "caches": ", ".join(" ".join(cache) for cache in session.machine.get("caches", {}).items()),
            "cores": session.machine["cores"],
            "threads": session.machine["threads"],
            "GPUs": ", ".join(session.machine.get("gpus") or []),
        }
        for session in (before, after)
    ]
    unlike = [
        f"{name} {facts[0][name] or 'none'} before, {facts[1][name] or 'none'} after"
        for name in facts[0]
        if facts[0][name] != facts[1][name]
    ]
    if unlike:
        raise DifferentError(f"expected runs of one machine, got {'; '.join(unlike)}")


def lines(before: Session, after: Session, rows: Sequence[Row]) -> list[str]:
    """What was compared, with what differs beside the commit, and the table."""
    said = [f"{name}: {_about(session)}" for name, session in (("before", before), ("after", after))]
    for name in ("torch", "python"):
        old, new = before.versions[name], after.versions[name]
        if old != new:
            said.append(f"NOTE: {name} {old} before, {new} after: differences may be its own")
    if not rows:
        return [*said, "", "No case and peer are in both."]
    header = ["case", "batch", "peer", "before", "middle half", "rounds", "after", "middle half", "rounds"]
    cells = [[*header, "times as fast", "claim"]]
    for row in rows:
        # What is not right is not fast.
        unfit = any(entry.check is not None and not entry.check.passed for entry in (row.before, row.after))
        ratio = "-" if unfit else number(row.before.median / row.after.median)
        where = [f"{row.operation}: {row.case}", str(row.batch), row.after.peer]
        cells.append([*where, *_times(row.before), *_times(row.after), ratio, row.verdict or "-"])
    counts = [sum(row.verdict == kind for row in rows) for kind in (GAIN, LOSS, FAILS)]
    names = "{} faster, {} slower, {} failing now".format(*counts)
    end = [f"{len(rows)} compared: {names}; nothing is claimed of the others."]
    others = [row.before.median / row.after.median for row in rows if not is_own(row.after.peer) and _judged(row)]
    if others:
        end.append(f"Peers of other libraries: {number(min(others))} to {number(max(others))} times as fast.")
    return [*said, "", *aligned(cells), "", *end]


def _judged(row: Row) -> bool:
    return row.verdict in (GAIN, LOSS, _NO_CLAIM)


def _about(session: Session) -> str:
    changes = " with changes" if session.dirty else ""
    return f"commit {(session.commit or 'unknown')[:8]}{changes}, {session.date[:10]}, {session.machine['cpu']}"


def _times(entry: Entry) -> list[str]:
    spread = Spread.of(entry)
    if entry.extrapolated:
        return [seconds(entry.median), "-", "e"]
    return [seconds(entry.median), f"{seconds(spread.lower)} to {seconds(spread.upper)}", str(spread.rounds)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
        rows = compare(before, after)
    except ValueError as error:
        print(f"not compared: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(before, after, rows)))
    lost = [row for row in rows if row.verdict == FAILS or (row.verdict == LOSS and is_own(row.after.peer))]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
