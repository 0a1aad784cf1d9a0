"""Tiles of every Triton kernel, timed on this GPU: ``python -m bench.gpu.tune --out FILE``; four minutes at most.

Writes a table in the form of ``kernels/tuned.json``, with what that table knows of other GPUs; put in its place it is
what kernels ask. Public operations and steps along a front run at the shapes of the benchmark, and whatever kernel asks
for tiles there is timed with each of its candidates, all others unchanged. Each shape of a kernel has a share of the
time, and the file is written after it. Kernels are compiled beforehand by several processes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bench.peers  # noqa: F401
from bench import registry
from bench.cases import case_of
from bench.clock import device_seconds, synchronise
from bench.gpu import sampler
from bench.gpu.ahead import in_processes
from bench.gpu.files import save
from bench.gpu.limit import OutOfTimeError, at_most
from bench.gpu.measure import Problem
from bench.registry import contender
from bench.units import seconds
from fastvq.kernels import tuning
from fastvq.kernels.launch import hardware
from fastvq.kernels.tuning import Asked, asking
from fastvq.sampling.engines import plan_of, static_inputs
from fastvq.sampling.engines.cuda_front import FrontGrid
from fastvq.sampling.engines.front_weights import FrontWeights
from fastvq.sampling.engines.front_work import Work
from fastvq.sampling.options import Precision

LIMIT, WARM_SHARE = 240.0, 0.45
# That the candidates of one kernel at one shape may take.
KERNEL_SECONDS = 20.0
# Tiles that gain less than this are not worth leaving the kernel's own rule.
GAIN = 1.03
_RUNS = 5
# Among which the candidates of a workload are shared out to be compiled.
_PARTS = 3
NO_GPU = 2

# Makes what is timed; kernels ask for tiles in either.
Make = Callable[[], Callable[[], object]]
Timer = Callable[[Callable[[], object]], float]

OPERATIONS = (
    "n65536-k512-d64-forward-ema-cuda",
    "n65536-k8192-d64-forward-cuda",
    "n65536-k1024-d128-forward-ema-bf16-cuda",
    "residual-n12288-k1024-d128-q8-training-cuda",
    "causal-attention-strict-width256-32x32-forward-backward-GPU-b32",
    "causal-attention-strict-width256-64x64-forward-backward-GPU-b8",
    "gated-block-rows-strict-256channels-32x32-forward-backward-GPU-b32",
    "gated-block-symmetric-strict-256channels-32x32-forward-backward-GPU-b32",
)
FRONT = "default-strict-bottom"


def workloads() -> dict[str, Make]:
    """What is timed, by name."""
    found: dict[str, Make] = {}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        found[f"front {precision}"] = functools.partial(_front, precision)
    return found | {case_id: functools.partial(_operation, case_id) for case_id in OPERATIONS}


def _operation(case_id: str) -> Callable[[], object]:
    """Ours in a case of the benchmark."""
    (form,) = contender(_problem(case_id), "fastvq").warm()
    return form.run


@functools.cache
def _problem(case_id: str) -> registry.Problem:
    case = case_of(case_id)
    return registry.PROBLEMS[case.operation](case)


def _front(precision: Precision) -> Callable[[], object]:
    """A step in the middle of the grid, where all rows are in flight, of 64 samples."""
    problem = _front_problem()
    weights = FrontWeights(Work.front(plan_of(problem.prior)), problem.device, precision)
    statics = static_inputs(problem.prior, problem.request)
    grid = FrontGrid(weights, problem.case.batch, statics)
    middle = grid.front.steps // 2

    @torch.inference_mode()
    def step() -> None:
        grid.step.fill_(middle)
        grid.enqueue_step()

    with torch.inference_mode():
        grid.begin(problem.request, statics)
    return step


@functools.cache
def _front_problem() -> Problem:
    return Problem.of(sampler.case_of(FRONT, 64))


def on_device(run: Callable[[], object]) -> float:
    """The least of some runs, after one that compiles."""
    device = torch.device("cuda")
    run()
    synchronise(device)
    return min(device_seconds(run, device) for _ in range(_RUNS))


@dataclass
class Table:
    """What was measured so far, and its file.

    Attributes:
        tiles, measured: as `fastvq.kernels.tuning` stores them: by capability, kernel and sizes.
    """

    path: Path
    tiles: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, known: Path) -> Table:
        """With what a table that is there already says about all GPUs."""
        stored = json.loads(known.read_text())
        return cls(path, stored["tiles"], stored["measured"])

    def add(self, asked: Asked, times: Mapping[Any, float | str], rule: float, workload: str) -> Any | None:
        """Note times of candidates, or what was wrong with them; returns the tiles taken, None for the rule's."""
        where = str(asked.capability), asked.kernel, asked.sizes
        fine = {tiles: seconds for tiles, seconds in times.items() if isinstance(seconds, float)}
        best = min(fine, key=fine.__getitem__, default=None)
        taken = best if best is not None and fine[best] * GAIN < rule else None
        if taken is not None:
            _inner(self.tiles, *where[:2])[where[2]] = taken._asdict()
        _inner(self.measured, *where[:2])[where[2]] = {
            "workload": workload,
            "rule_seconds": rule if math.isfinite(rule) else None,
            "candidates": [{**tiles._asdict(), "found": found} for tiles, found in times.items()],
        }
        return taken

    def write(self) -> None:
        save(self.path, {"format": tuning.FORMAT, "tiles": self.tiles, "measured": self.measured})


def _inner(table: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        table = table.setdefault(name, {})
    return table


def asked_by(make: Make) -> list[Asked]:
    """Kernels that ask for tiles in a workload, each size once."""
    with asking() as found:
        make()()
    return list(dict.fromkeys(found))


def tune(table: Table, some: Mapping[str, Make], timer: Timer, end: float, log: Callable[[str], None]) -> None:
    """Candidates of all kernels in some workloads, until the clock shows ``end``; the table is written after each."""
    done: set[tuple[str, int, str]] = set()
    for name, make in some.items():
        try:
            with at_most(end - time.monotonic()):
                kernels = asked_by(make)
        except OutOfTimeError:
            kernels = []
        except Exception as error:
            log(f"{name}: {_said(error)}")
            continue
        if time.monotonic() >= end:
            log(f"{name}: out of time")
            continue
        for asked in kernels:
            if asked[:3] in done:
                continue
            done.add(asked[:3])
            until = min(end, time.monotonic() + KERNEL_SECONDS)
            rule, times = _times(make, asked, timer, until)
            taken = table.add(asked, times, rule, name)
            table.write()
            count = sum(isinstance(found, float) for found in times.values())
            what = "as before" if taken is None else f"{tuple(taken)}, {seconds(times[taken])}"
            log(f"{name}: {asked.kernel}, {asked.sizes}: rule {seconds(rule)}; {what}; {count} candidates timed")


def _times(
    make: Make, asked: Asked, timer: Timer, until: float, some: slice = slice(None)
) -> tuple[float, dict[Any, float | str]]:
    """Seconds with the kernel's own rule (infinite if not found), and with each candidate or what was wrong with it.

    Args:
        some: of the rule and the candidates, in this order.
    """
    times: dict[Any, float | str] = {}
    rule = math.inf
    for tiles in (None, *asked.candidates)[some]:
        found: float | str
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise OutOfTimeError
            with at_most(left), asking(None if tiles is None else asked[:3], tiles):
                found = timer(make())
        except OutOfTimeError:
            found = "out of time"
        except Exception as error:
            found = _said(error)
        if tiles is not None:
            times[tiles] = found
        elif isinstance(found, float):
            rule = found
    return rule, times


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def warm(index: int, count: int, some: Mapping[str, Make]) -> None:
    """Compile a share of the candidates of some workloads, by running each once, as one of ``count`` processes."""

    def once(run: Callable[[], object]) -> float:
        run()
        synchronise(torch.device("cuda"))
        return 0.0

    for name, part in list(itertools.product(some, range(_PARTS)))[index::count]:
        try:
            for asked in asked_by(some[name]):
                share = slice(part, None, _PARTS)
                _, times = _times(some[name], asked, once, time.monotonic() + LIMIT, share)
                wrong = [f"{tuple(tiles)}: {found}" for tiles, found in times.items() if isinstance(found, str)]
                print(f"{name}: {asked.kernel}, {asked.sizes}: {len(times)} candidates {wrong or ''}", flush=True)
        except Exception as error:
            print(f"{name}: {_said(error)}", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"for everything (default: {LIMIT:.0f})")
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="only compile, as process I of N")
    every = workloads()
    parser.add_argument("--only", nargs="+", choices=every, metavar="WORKLOAD", help=f"of: {', '.join(every)}")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU is available, so there is nothing to tune.")
        return NO_GPU
    some = {name: make for name, make in every.items() if options.only is None or name in options.only}
    if options.share is not None:
        warm(*options.share, some)
        return 0
    if options.out is None:
        parser.error("--out is missing")
    end = time.monotonic() + options.seconds
    in_processes("bench.gpu.tune", _PARTS * len(some), WARM_SHARE * options.seconds, "--only", *some)
    print(f"compute capability {hardware(torch.device('cuda', torch.cuda.current_device())).capability}")
    table = Table.of(options.out, tuning.TABLE)
    tune(table, some, on_device, end, functools.partial(print, flush=True))
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
