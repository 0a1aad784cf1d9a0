"""Results as a table and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import Entry, Recorder, Result
from bench.machine import Ceilings, describe_commit, describe_machine, describe_versions, now

FORMAT = 2


def tables(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """Lines of one table per operation, with a column for the ratio to every peer."""
    lines: list[str] = []
    for operation in dict.fromkeys(result.operation for result in results):
        group = [result for result in results if result.operation == operation]
        lines += [operation, *_table(group, ceilings), ""]
    return lines


_LEGENDS = {
    "sampling": [
        "sampling: weights that exceed the second-level caches are read anew at every position, in the floor too.",
        "Check: the naive model's logits for the drawn codes must give these codes, up to a margin of rounding.",
        "Every engine runs with one thread or all, whichever suits it.",
        "Memory: beyond the model, and what was predicted.",
    ],
    "nearest code": [
        "nearest code: batch is the number N of vectors; the floor is 2 N K D operations, nothing else.",
        "Check, in float64, of a sample of rows: no chosen code is farther than the nearest one by more than",
        "16 u (|x| + |c|)^2, u = 2^-24, c the longer of the two (for D > 256 sqrt(D / 256) times that); with EMA also",
        "the averages of all.",
        "time/gemm only: the product alone, written to memory in full where that is less than 3 GB.",
        "With EMA fastvq and vector-quantize-pytorch work out the commitment loss too, the latter the chosen vectors.",
        "All threads. Memory: beyond inputs and codebook.",
    ],
    "quantiser module": [
        "quantiser module: training forward for inputs that need a gradient: codes, straight-through vectors,",
        "commitment loss, EMA update. Floor, check, threads and memory as for nearest code.",
    ],
    "causal conv": [
        "causal conv: the floor counts the taps that the mask leaves. Every peer multiplies the masked ones too, in",
        "the quicker memory layout and way of padding.",
    ],
    "gated block": ["gated block: two causal convolutions and what lies around them, in a residual layer."],
    "causal attention": ["causal attention: the floor is half of the two full products."],
    "causal prior": ["causal prior: the peer is the same prior with masked convolutions in place of causal ones."],
}


def legend(results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """What the columns mean, and the rates that floors were worked out with."""
    operations = dict.fromkeys(result.operation for result in results)
    return [
        "time: median of the runs; e: rests on an extrapolated time. over X: time of X / time.",
        f"floor: the case's work at the best rates of this session ({ceilings.rate / 1e9:.0f} GFLOP/s).",
        "No ratios for what is not exact or failed its check. memory: peak of a fresh process.",
        *(line for operation in operations for line in _LEGENDS.get(operation, [])),
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
        steps = [total - row for total, row in zip(entry.seconds, spent, strict=True)]
        remarks.append(f"rows {seconds(statistics.median(spent))}, steps {seconds(statistics.median(steps))}")
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


def to_json(recorder: Recorder) -> dict[str, Any]:
    """Everything that was measured, every repeat included."""
    return {
        "format": FORMAT,
        "date": now(),
        "quick": recorder.quick,
        "machine": describe_machine(),
        "load_before": recorder.load,
        "versions": describe_versions(),
        **recorder.source,
        "ceilings": recorder.ceilings.to_json(),
        "results": [_result_json(result, recorder) for result in recorder.results],
    }


def _result_json(result: Result, recorder: Recorder) -> dict[str, Any]:
    floor = None if recorder.quick else result.floor(recorder.ceilings)
    values = dataclasses.asdict(result)
    values["floor_seconds"] = floor
    for entry, stored in zip(result.entries, values["entries"], strict=True):
        stored["median"] = entry.median
        stored["over_floor"] = entry.median / floor if floor and entry.comparable else None
        stored["speedup_over"] = {
            other.peer: ratio for other in result.entries if (ratio := result.speedup(entry, other.peer)) is not None
        }
    return values


def free_path(folder: Path) -> Path:
    """A file in the folder, named after date and commit, that does not exist yet."""
    stem = f"{now()[:19].replace(':', '')}-{(describe_commit()['commit'] or 'unknown')[:8]}"
    free = (folder / f"{stem}{suffix}.json" for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))))
    return next(path for path in free if not path.exists())


def write_json(recorder: Recorder, path: Path) -> None:
    """Everything so far; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(to_json(recorder), indent=1) + "\n")
    part.replace(path)
