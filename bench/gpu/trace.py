"""When every instruction of the persistent kernel began, had waited, had worked and had signalled.

``python -m bench.gpu.trace --prior default-strict-top --batch 1 --precision bfloat16 --out DIR`` samples a grid and
writes of its last row ``trace.json``, which chrome://tracing and Perfetto draw with a line for each block, and
``trace.txt``, the table that it prints. Needs a build with the tracer:
``CMAKE_ARGS=-DFASTVQ_TRACE=ON pip install -e .`` adds the module ``fastvq._trace``; the engine that users get has none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.engines import traced_row
from bench.gpu.files import aligned
from bench.gpu.measure import Problem
from bench.gpu.sampler import case_of

Program = Sequence[Mapping[str, Any]]
# The marks of csrc/cuda/step_kernel.h.
_BEGUN, _WAITED, _WORKED, _SIGNALLED, _NANOSECONDS = range(5)
_PARTS = (("wait", _BEGUN, _WAITED), ("work", _WAITED, _WORKED), ("signal", _WORKED, _SIGNALLED))


@dataclass(frozen=True)
class Trace:
    """Times of a row.

    Attributes:
        programs: the instructions of every block.
        times: int64 [blocks, columns, instructions, 5]; of blocks with fewer instructions the rest is 0.
    """

    programs: Sequence[Program]
    times: NDArray[np.int64]

    @property
    def clocks_per_microsecond(self) -> float:
        """Of the blocks' own clocks, by what the device's timer says between their first and last instruction."""
        first, last = self.times[:, 0, 0], self.times[:, -1, 0]
        nanoseconds = (last - first)[:, _NANOSECONDS]
        clocks = (last - first)[:, _BEGUN]
        known = nanoseconds > 0
        return float(np.median(clocks[known] / nanoseconds[known])) * 1000 if known.any() else 1000.0

    def microseconds(self) -> NDArray[np.float64]:
        """How long instructions waited, worked and signalled: [blocks, columns, instructions, 3]."""
        marks = self.times[..., : _SIGNALLED + 1].astype(np.float64)
        # Without a signal the next instruction follows at once.
        marks[..., _SIGNALLED] = np.maximum(marks[..., _SIGNALLED], marks[..., _WORKED])
        return np.diff(marks, axis=-1) / self.clocks_per_microsecond

    def busiest(self) -> int:
        """The block that spent most time on other things than waiting."""
        return int(self.microseconds()[..., 1:].sum(axis=(1, 2, 3)).argmax())


def describe(instr: Mapping[str, Any]) -> str:
    """What an instruction is, in a few words."""
    shape = {"affine": f" {instr['depth']} deep, {instr['columns']} columns", "attention": f" {instr['jobs']} jobs"}
    steps = f", {instr['steps']} steps" if instr["code"] in ("affine", "chain") else ""
    return f"{instr['code']}{shape.get(instr['code'], '')}{steps}"


def table(trace: Trace) -> list[str]:
    """The busiest block, instruction by instruction, and all blocks by kind; medians over columns in microseconds."""
    spent, block = trace.microseconds(), trace.busiest()
    columns = np.diff(trace.times[:, :, 0, _BEGUN], axis=1) / trace.clocks_per_microsecond
    column = f"{np.median(columns):.2f}" if columns.size else "-"
    lines = [f"{len(trace.programs)} blocks, {column} us a column; the busiest block is {block}:", ""]
    rows = [("", "instruction", "waits", "wait", "work", "signal")]
    for number, instr in enumerate(trace.programs[block]):
        parts = (f"{value:.2f}" for value in np.median(spent[block, :, number], axis=0))
        rows.append((str(number), describe(instr), str(instr["waits"]), *parts))
    lines += [*aligned(rows), "", "All blocks:", ""]
    kinds: dict[str, list[NDArray[np.float64]]] = {}
    for number, program in enumerate(trace.programs):
        for place, instr in enumerate(program):
            kinds.setdefault(instr["code"], []).append(np.median(spent[number, :, place], axis=0))
    rows = [("kind", "instructions", "wait", "work", "signal")]
    for kind, found in kinds.items():
        rows.append((kind, str(len(found)), *(f"{value:.2f}" for value in np.median(found, axis=0))))
    return [*lines, *aligned(rows)]


def chrome_events(trace: Trace) -> list[dict[str, Any]]:
    """Complete events of the trace event format, a thread for each block."""
    events = []
    start = int(trace.times[:, 0, 0, _NANOSECONDS].min())
    rate = trace.clocks_per_microsecond
    for block, program in enumerate(trace.programs):
        first = trace.times[block, 0, 0]
        offset = (int(first[_NANOSECONDS]) - start) / 1000
        for column in range(trace.times.shape[1]):
            for number, instr in enumerate(program):
                marks = trace.times[block, column, number]
                for name, begin, end in _PARTS:
                    if marks[end] <= marks[begin]:
                        continue
                    events.append(
                        {
                            "name": name if name != "work" else describe(instr),
                            "cat": name,
                            "ph": "X",
                            "pid": 0,
                            "tid": block,
                            "ts": offset + float(marks[begin] - first[_BEGUN]) / rate,
                            "dur": float(marks[end] - marks[begin]) / rate,
                            "args": {"column": column, "instruction": number, **instr},
                        }
                    )
    return events


def save(trace: Trace, folder: Path) -> list[str]:
    """Write both files; returns the lines of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = table(trace)
    (folder / "trace.txt").write_text("\n".join(lines) + "\n")
    (folder / "trace.json").write_text(json.dumps({"traceEvents": chrome_events(trace), "displayTimeUnit": "ns"}))
    return lines


def tracing_engine() -> ModuleType:
    """The module with the tracer; ends the program with what to do where it is missing."""
    try:
        return importlib.import_module("fastvq._trace")
    except ImportError as error:
        how = "CMAKE_ARGS=-DFASTVQ_TRACE=ON pip install -e . builds it where there is a CUDA compiler"
        raise SystemExit(f"trace: fastvq._trace cannot be imported ({error}); {how}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.trace", description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="default-strict-top", help="a case of the sampler's benchmark")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--small", action="store_true", help="the case's small twin")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    module = tracing_engine()
    if not torch.cuda.is_available():
        raise SystemExit("trace: there is no GPU")
    problem = Problem.of(case_of(options.prior, options.batch, small=options.small))
    programs, times = traced_row(problem.prior, problem.request, options.precision, module)
    print("\n".join(save(Trace(programs, times), options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
