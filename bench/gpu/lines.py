"""What was found about the sampler's engines: a line for each, as a table, and what in them is a failure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.clock import Timed
from bench.gpu.files import aligned
from bench.units import number, seconds

# Why something was left out without that being a failure.
LATE = "out of time"
LEGEND = (
    "time: of whole calls. device: of the GPU, between events around them. e: extrapolated.",
    "floor: at the rates measured here, everything in the precision of the line's weights, row phase included (that of",
    "the cuda engine is float32 whatever the weights are). time/floor: of whole calls.",
)


@dataclass
class Line:
    """One engine in one case.

    Attributes:
        seconds: of whole calls, all of their work done, or the one figure of an extrapolation.
        device_seconds: of the GPU in them, between two events.
        exact: False for an engine that does not promise the naive sampler's codes.
        passed, said: its check, and in a few words what it found.
        extrapolated: how the time was extrapolated; None if it was measured in full.
        floor: seconds that it takes at least, if known.
        left_out: why it was not measured.
        device_failed: whether the GPU stopped working here or before.
    """

    case: str
    batch: int
    engine: str
    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    exact: bool = True
    passed: bool = True
    said: str = ""
    extrapolated: str | None = None
    floor: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: str | None = None
    device_failed: bool = False

    def add(self, timed: Timed[object]) -> None:
        self.seconds.append(timed.seconds)
        self.device_seconds.append(timed.device_seconds)

    def judge(self, passed: bool, said: str) -> None:
        """A check among others."""
        self.passed &= passed
        self.said = "; ".join(part for part in (self.said, said) if part)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        if self.left_out is not None:
            return f"{self.engine}: {self.left_out}"
        return f"{self.engine}: {seconds(self.median)} x {len(self.seconds)}; {self.extrapolated or self.said}"


def failures(lines: Sequence[Line]) -> list[str]:
    """What keeps a run from having passed: failed checks, engines that raised or could not run."""
    return [
        f"{line.case}, batch {line.batch}: {line.engine}: {line.left_out or line.said}"
        for line in lines
        if not line.passed or line.left_out not in (None, LATE)
    ]


def table(lines: Sequence[Line]) -> list[str]:
    """Times, ratio to the naive sampler, and time over the floor of the same precision."""
    naive = {(line.case, line.batch): line.median for line in lines if line.engine == "naive" and line.seconds}
    rows = [("case", "batch", "engine", "time", "device", "runs", "over naive", "floor", "time/floor", "check")]
    for line in lines:
        where = (line.case, str(line.batch), line.engine)
        if line.left_out is not None:
            rows.append((*where, *["-"] * 6, line.left_out))
            continue
        over = naive.get((line.case, line.batch)) if line.exact and line.passed and line.engine != "naive" else None
        cells = (
            seconds(line.median),
            seconds(statistics.median(line.device_seconds)),
            "e" if line.extrapolated else str(len(line.seconds)),
            "-" if over is None else f"{number(over / line.median)} e",
            "-" if line.floor is None else seconds(line.floor),
            "-" if line.floor is None or not line.passed else number(line.median / line.floor),
            "FAILED" if not line.passed else "ok" if line.exact else "not exact",
        )
        rows.append((*where, *cells))
    return aligned(rows)


def both_levels(lines: Sequence[Line]) -> list[str]:
    """A line per kind of prior, batch and engine: top and bottom level together, where both were measured."""
    found: dict[tuple[str, int, str], list[Line]] = {}
    for line in lines:
        family, _, level = line.case.rpartition("-")
        if level in ("top", "bottom") and line.floor and line.passed:
            found.setdefault((family, line.batch, line.engine), []).append(line)
    said = []
    for (family, batch, engine), both in found.items():
        if len(both) == 2:
            time, floor = sum(line.median for line in both), sum(line.floor or 0.0 for line in both)
            label = " e" if any(line.extrapolated for line in both) else ""
            over = f"floor {seconds(floor)}, time/floor {number(time / floor)}"
            said.append(f"{family}, top + bottom, batch {batch}, {engine}: {seconds(time)}{label}; {over}")
    return said
