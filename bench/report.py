"""Results as tables: of a session, or of files: ``python -m bench.report FILE.json ...``."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import bench.peers  # noqa: F401
from bench.files import load
from bench.harness import Entry, Result
from bench.machine import Ceilings
from bench.registry import PROBLEMS


def tables(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """Lines of one table per operation, with a column for the ratio to every peer."""
    lines: list[str] = []
    for operation in dict.fromkeys(result.operation for result in results):
        group = [result for result in results if result.operation == operation]
        lines += [operation, *_table(group, ceilings), ""]
    return lines


def legend(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """What the columns mean, and the rates that floors were worked out with."""
    kinds = dict.fromkeys(PROBLEMS[result.operation] for result in results if result.operation in PROBLEMS)
    return [
        "time: median of the runs; e: rests on an extrapolated time. over X: time of X / time.",
        f"floor: the case's work at the best rates of this session ({ceilings.rate / 1e9:.0f} GFLOP/s).",
        "No ratios for what is not exact or failed its check. memory: peak of a fresh process.",
        *dict.fromkeys(line for kind in kinds for line in kind.legend),
        "Best rates:",
        *(f"  {line}" for line in ceilings.lines()),
    ]


def _table(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    entries = [entry for result in results for entry in result.entries]
    peers = list(dict.fromkeys(entry.peer for entry in entries if entry.exact and entry.whole))
    parts = list(dict.fromkeys(entry.peer for entry in entries if not entry.whole))
    columns = [f"over {peer}" for peer in peers] + ["time/floor"] + [f"time/{part}" for part in parts]
    header = ["case", "batch", "peer", "time", "runs", *columns, "memory"]
    rows = [[*header, "phases, check"]]
    for result in results:
        first = len(rows)
        for entry in result.entries:
            runs = "e" if entry.extrapolated else str(len(entry.seconds))
            ratios = [_ratio(result, entry, peer) for peer in peers] + [_over_floor(result, entry, ceilings)]
            ratios += [_over_part(result, entry, part) for part in parts]
            cells = ["", "", _label(entry), seconds(entry.median), runs, *ratios]
            rows.append([*cells, _memory(result, entry.peer), _remarks(entry)])
        for peer, reason in result.left_out.items():
            cells = ["", "", peer, *["-"] * (len(header) - 4)]
            rows.append([*cells, _memory(result, peer), f"left out: {reason}"])
        rows[first][:2] = [result.case, str(result.batch)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # Text to the left, numbers to the right.
    left = {0, 2, len(header)}
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _ratio(result: Result, entry: Entry, peer: str) -> str:
    found = result.speedup(entry, peer)
    other = result.entry(peer)
    if found is None or other is None:
        return "-"
    return number(found) + (" e" if entry.extrapolated or other.extrapolated else "")


def _label(entry: Entry) -> str:
    if not entry.whole:
        return f"{entry.peer} (not the operation)"
    return entry.peer if entry.exact else f"{entry.peer} (not exact)"


def _over_part(result: Result, entry: Entry, part: str) -> str:
    other = result.entry(part)
    return "-" if other is None or not entry.comparable else number(entry.median / other.median)


def _over_floor(result: Result, entry: Entry, ceilings: Ceilings) -> str:
    floor = result.floor(ceilings)
    if not floor or not entry.comparable:
        return "-"
    return number(entry.median / floor) + (" e" if entry.extrapolated else "")


def _memory(result: Result, peer: str) -> str:
    found = next((memory for memory in result.memory if memory.peer == peer), None)
    if found is None:
        return "-"
    size = f"{found.measured / 1e6:.0f} MB"
    return size if found.predicted is None else f"{size} = {found.measured / found.predicted:.2f} of predicted"


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


def seconds(value: float) -> str:
    """Three digits, in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value * 1e9:.3g} ns"


def number(value: float) -> str:
    """Three digits, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of result files, of either format."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for path in parser.parse_args(arguments).files:
        session = load(path)
        print(f"{path}: {session.machine['cpu']}, {session.date[:10]}, commit {session.commit}", "", sep="\n")
        print("\n".join([*tables(session.results, session.ceilings), *legend(session.results, session.ceilings), ""]))


if __name__ == "__main__":
    main()
