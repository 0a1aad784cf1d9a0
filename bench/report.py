"""Results as tables: of a session, or of files: ``python -m bench.report FILE.json ... [--html PAGE.html]``."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import bench.peers  # noqa: F401
from bench.files import Session, load
from bench.harness import Entry, Result
from bench.machine import Ceilings
from bench.registry import PROBLEMS
from bench.units import number, seconds
from fastvq.errors import UnavailableError

MISSING = "-"
# Columns that hold text; the others are numbers, on the right.
TEXT = ("case", "peer", "phases, check", "check", "claim")


def tables(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """Lines of one table per operation, with a column for the ratio to every peer."""
    lines: list[str] = []
    for operation, rows in by_operation(results, ceilings).items():
        lines += [operation, *aligned(rows), ""]
    return lines


def legend(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """What the columns mean, and the rates that floors were worked out with."""
    kinds = dict.fromkeys(PROBLEMS[result.operation] for result in results if result.operation in PROBLEMS)
    rate = f" ({ceilings.rate / 1e9:.0f} GFLOP/s)" if ceilings.gemm or not ceilings.gpu else ""
    return [
        "time: median of the runs; e: rests on an extrapolated time. over X: time of X / time.",
        f"floor: the case's work at the best rates of this session{rate}.",
        "No ratios for what is not exact or failed its check. memory: peak of a fresh process.",
        *dict.fromkeys(line for kind in kinds for line in kind.legend),
        "Best rates:",
        *(f"  {line}" for line in ceilings.lines()),
    ]


def by_operation(results: Sequence[Result], ceilings: Ceilings, *, brief: bool = False) -> dict[str, list[list[str]]]:
    """The rows of a table per operation, its header first.

    Args:
        brief: of checks only whether they passed, nothing of phases, and no peers that were left out.
    """
    operations = dict.fromkeys(result.operation for result in results)
    groups = {name: [result for result in results if result.operation == name] for name in operations}
    return {name: _rows(group, ceilings, brief) for name, group in groups.items()}


def _rows(results: Sequence[Result], ceilings: Ceilings, brief: bool) -> list[list[str]]:
    entries = [entry for result in results for entry in result.entries]
    peers = list(dict.fromkeys(entry.peer for entry in entries if entry.exact and entry.whole))
    parts = list(dict.fromkeys(entry.peer for entry in entries if not entry.whole))
    columns = [f"over {peer}" for peer in peers] + ["time/floor"] + [f"time/{part}" for part in parts]
    rows = [["case", "batch", "peer", "time", "runs", *columns, "memory", "check" if brief else "phases, check"]]
    for result in results:
        floor = result.floor(ceilings)
        for entry in result.entries:
            runs = "e" if entry.extrapolated else str(entry.rounds)
            cells = [ratio(result, entry, peer) for peer in peers] + [over_floor(entry, floor)]
            cells += [over_part(result, entry, part) for part in parts]
            where = [result.case, str(result.batch), _label(entry), seconds(entry.median), runs]
            rows.append([*where, *cells, _memory(result, entry.peer), _checked(entry) if brief else _remarks(entry)])
        for peer, reason in () if brief else result.left_out.items():
            where = [result.case, str(result.batch), peer, *[MISSING] * (len(columns) + 2)]
            rows.append([*where, _memory(result, peer), f"left out: {reason}"])
    return rows


def aligned(rows: Sequence[list[str]]) -> list[str]:
    """Lines of a table that begins with case and batch, each named once."""
    header, *body = rows
    shown = [header]
    for before, row in zip(rows, body, strict=False):
        shown.append(["", "", *row[2:]] if row[:2] == before[:2] else row)
    widths = [max(len(row[i]) for row in shown) for i in range(len(header))]
    lines = []
    for row in shown:
        cells = [
            cell.ljust(width) if name in TEXT else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def ratio(result: Result, entry: Entry, peer: str) -> str:
    """How many times as fast an entry is as a peer; "-" where there is no ratio."""
    found, other = result.speedup(entry, peer), result.entry(peer)
    if found is None or other is None:
        return MISSING
    return number(found) + (" e" if entry.extrapolated or other.extrapolated else "")


def over_part(result: Result, entry: Entry, part: str) -> str:
    """Its time as a multiple of that of a part of the operation."""
    other = result.entry(part)
    return MISSING if other is None or not entry.comparable else number(entry.median / other.median)


def over_floor(entry: Entry, floor: float | None) -> str:
    """Its time as a multiple of the least seconds that the case takes."""
    if not floor or not entry.comparable:
        return MISSING
    return number(entry.median / floor) + (" e" if entry.extrapolated else "")


def _label(entry: Entry) -> str:
    if not entry.whole:
        return f"{entry.peer} (not the operation)"
    return entry.peer if entry.exact else f"{entry.peer} (not exact)"


def _memory(result: Result, peer: str) -> str:
    found = next((memory for memory in result.memory if memory.peer == peer), None)
    if found is None:
        return MISSING
    size = f"{found.measured / 1e6:.0f} MB"
    return size if found.predicted is None else f"{size} = {found.measured / found.predicted:.2f} of predicted"


def _checked(entry: Entry) -> str:
    if entry.check is None:
        return MISSING
    return "passed" if entry.check.passed else f"FAILED: {entry.check.summary}"


def _remarks(entry: Entry) -> str:
    remarks = [f"{entry.facts['threads']} thr"] if "threads" in entry.facts else []
    if spent := entry.facts.get("row_phase_seconds"):
        # Seen in every run, or once for all of them.
        steps = [total - row for total, row in zip(entry.seconds, itertools.cycle(spent), strict=False)]
        remarks.append(f"rows {seconds(statistics.median(spent))}, steps {seconds(statistics.median(steps))}")
    if found := entry.facts.get("device_seconds"):
        remarks.append(f"on the device {seconds(statistics.median(found))}")
    if "identical_grids" in entry.facts:
        remarks.append(f"{entry.facts['identical_grids']:.0%} identical grids")
    remarks += entry.remarks
    if entry.check is not None:
        remarks.append(("" if entry.check.passed else "CHECK FAILED: ") + entry.check.summary)
    if entry.extrapolated:
        remarks.append(entry.extrapolated)
    return "; ".join(remarks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of result files, of any format, or write them with their pictures as one page."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--html", type=Path, metavar="PAGE.html", help="a page that is one file, pictures inside")
    options = parser.parse_args(arguments)
    try:
        sessions = {path: load(path) for path in options.files}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.html is not None:
        # Pictures are drawn by a library that tables do without.
        from bench.page import page

        try:
            page(sessions).save(options.html)
        except UnavailableError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"written to {options.html}")
        return 0
    for path, session in sessions.items():
        print("\n".join(_said(path, session)))
    return 0


def _said(path: Path, session: Session) -> list[str]:
    about = f"{path}: {session.machine['cpu']}, {session.date[:10]}, commit {session.commit}"
    return [about, "", *tables(session.results, session.ceilings), *legend(session.results, session.ceilings), ""]


if __name__ == "__main__":
    sys.exit(main())
