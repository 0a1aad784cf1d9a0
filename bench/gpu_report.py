"""The sampler's results on a GPU as a table, and what in them is a failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness import Check, Entry, Result
from bench.report import number, seconds

# Why something was left out without that being a failure.
LATE = "out of time"
LEGEND = (
    "e: extrapolated. floor: at the rates measured here, everything in the precision of the line's weights, row phase",
    "included (the cuda engine's row phase is float32 whatever the weights are).",
)


def failures(results: Sequence[Result]) -> list[str]:
    """What keeps a run from having passed: failed checks, engines that raised or could not run."""
    found = []
    for result in results:
        where = f"{result.case}, batch {result.batch}"
        for entry in result.entries:
            if entry.check is not None and not entry.check.passed:
                found.append(f"{where}: {entry.peer}: {entry.check.summary}")
            if entry.facts.get("repeats_identical") is False:
                found.append(f"{where}: {entry.peer}: repeats differ")
        found += [f"{where}: {peer}: {why}" for peer, why in result.left_out.items() if why != LATE]
    return found


def table(results: Sequence[Result]) -> list[str]:
    """Time, ratio to the naive sampler, and time over the floor of the same precision."""
    rows = [("case", "batch", "engine", "time", "runs", "over naive", "floor", "time/floor", "check")]
    for result in results:
        for entry in result.entries:
            naive = result.speedup(entry, "naive")
            floor = entry.facts.get("floor_seconds")
            check = "not exact" if entry.check is None else ("ok" if entry.check.passed else "FAILED")
            cells = (
                seconds(entry.median),
                "e" if entry.extrapolated else str(len(entry.seconds)),
                "-" if naive is None else f"{number(naive)} e",
                "-" if floor is None else seconds(floor),
                "-" if floor is None or check == "FAILED" else number(entry.median / floor),
            )
            rows.append((result.case, str(result.batch), entry.peer, *cells, check))
        rows += [
            (result.case, str(result.batch), peer, "-", "-", "-", "-", "-", why)
            for peer, why in result.left_out.items()
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(payload: dict[str, Any]) -> list[str]:
    """The same table from a file that `run` has written."""
    fields = ("operation", "case", "batch", "left_out")
    results = []
    for stored in payload["results"]:
        entries = []
        for one in stored["entries"]:
            check = None if one["check"] is None else Check(one["check"]["passed"], one["check"]["summary"])
            rest = {name: one[name] for name in ("exact", "whole", "extrapolated", "facts", "remarks")}
            entries.append(Entry(one["peer"], one["seconds"], check, **rest))
        results.append(Result(**{name: stored[name] for name in fields}, entries=entries))
    return [*table(results), *both_levels(results)]


def both_levels(results: Sequence[Result]) -> list[str]:
    """A line per kind of prior, batch and engine: top and bottom level together, where both were measured."""
    found: dict[tuple[str, int, str], list[Entry]] = {}
    for result in results:
        family, _, level = result.case.rpartition("-")
        for entry in result.entries if level in ("top", "bottom") else ():
            if entry.facts.get("floor_seconds") and (entry.check is None or entry.check.passed):
                found.setdefault((family, result.batch, entry.peer), []).append(entry)
    lines = []
    for (family, batch, peer), entries in found.items():
        if len(entries) == 2:
            time = sum(entry.median for entry in entries)
            floor = sum(entry.facts["floor_seconds"] for entry in entries)
            label = " e" if any(entry.extrapolated for entry in entries) else ""
            over = f"floor {seconds(floor)}, time/floor {number(time / floor)}"
            lines.append(f"{family}, top + bottom, batch {batch}, {peer}: {seconds(time)}{label}; {over}")
    return lines
