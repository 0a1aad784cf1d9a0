"""One table of everything that was timed: ours, the best of the others, their ratio, and time over the floor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from bench.gpu.lines import Line
from bench.gpu.measure import VARIANTS
from bench.harness import Result
from bench.machine import Ceilings
from bench.units import number, seconds


class Row(NamedTuple):
    """Seconds of whole calls, and of the device alone where that is known; ``peer`` is the quickest of the others."""

    case: str
    ours: float
    device: float | None
    peer: str = ""
    other: float | None = None
    floor: float | None = None
    extrapolated: bool = False


def table(lines: Sequence[Line], results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """Markdown; what failed its check or was not timed has no row."""
    rows = [*_sampler_rows(lines), *(row for result in results if (row := _operation_row(result, ceilings)))]
    if not rows:
        return []
    said = ["| case | ours | of it on the device | best peer | ratio | time / floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        guessed = " e" if row.extrapolated else ""
        cells = [
            row.case,
            seconds(row.ours),
            "-" if row.device is None else seconds(row.device),
            "-" if row.other is None else f"{row.peer} {seconds(row.other)}{guessed}",
            "-" if row.other is None else number(row.other / row.ours) + guessed,
            "-" if not row.floor else number(row.ours / row.floor),
        ]
        said.append(f"| {' | '.join(cells)} |")
    return [*said, "", "ratio: time of the best peer / ours. e: extrapolated. floor: at the rates measured here."]


def _sampler_rows(lines: Sequence[Line]) -> list[Row]:
    """A row per case, batch and precision: the quicker of the engine with and without a graph."""
    rows = []
    for case, batch in dict.fromkeys((line.case, line.batch) for line in lines):
        fine = [
            line for line in lines if (line.case, line.batch) == (case, batch) and line.left_out is None and line.passed
        ]
        # Peers are float32 engines, of which those that are not ours under another name count.
        others = [line for line in fine if line.engine not in VARIANTS]
        best = min(others, key=lambda line: line.median, default=None)
        for exact, precision in ((True, "float32"), (False, "bfloat16")):
            ours = [line for line in fine if line.engine in VARIANTS and line.exact is exact]
            if not ours:
                continue
            mine = min(ours, key=lambda line: line.median)
            name = f"{case}, batch {batch}, {precision} ({mine.engine})"
            row = Row(name, mine.median, statistics.median(mine.device_seconds), floor=mine.floor)
            if best is not None and exact:
                row = row._replace(peer=best.engine, other=best.median, extrapolated=best.extrapolated is not None)
            rows.append(row)
    return rows


def _operation_row(result: Result, ceilings: Ceilings) -> Row | None:
    ours = result.entry("fastvq")
    if ours is None or not ours.comparable:
        return None
    device = ours.facts.get("device_seconds")
    others = [entry for entry in result.entries if entry.comparable and not entry.peer.startswith("fastvq")]
    # The package's own slower forms are no rivals.
    others = [entry for entry in others if entry.peer not in ("torch", "levels in turn")]
    best = min(others, key=lambda entry: entry.median, default=None)
    row = Row(
        f"{result.operation}: {result.case}, {result.batch}",
        ours.median,
        statistics.median(device) if device else None,
        floor=result.floor(ceilings),
    )
    return row if best is None else row._replace(peer=best.peer, other=best.median)
