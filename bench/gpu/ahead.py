"""Kernels compiled before anything is timed: ``python -m bench.gpu.ahead``; several processes share the work.

Every task runs once what will be timed, so that Triton's and Inductor's caches on disk hold its kernels; a process
takes a few seconds to start, and a kernel a few to compile. What fails here is no failure: it is when it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import bench.peers  # noqa: F401
from bench.cases import case_of
from bench.gpu import operations, sampler
from bench.gpu.measure import VARIANTS, Problem, other_line, warm_up
from bench.machine import ROOT
from bench.registry import PEERS, PROBLEMS, contender, peers_of

# At most; each holds a context of some hundred megabytes on the GPU.
_PROCESSES = 8


class Task(NamedTuple):
    """An engine (or peer) in a case, by name."""

    kind: str
    case: str
    batch: int
    name: str


def tasks() -> list[Task]:
    """The engine's own first, then training steps, which take longest to compile, then all others."""
    found = []
    for prior, batch, engines in sampler.JOBS:
        # Kernels of 16 and 256 samples are those of 64.
        names = engines if batch in (1, 64) and prior != sampler.PIPELINE else ()
        found += [Task("sampler", prior, batch, name) for name in names if _compiles(name)]
    for case_id in operations.CASES:
        case = case_of(case_id)
        registered = PEERS[case.operation]
        names = [name for name in peers_of(case) if name.startswith("fastvq") or registered[name].optional]
        found += [Task("operations", case_id, case.batch, name) for name in names]
    return sorted(found, key=_urgency)


def _urgency(task: Task) -> int:
    if task.kind == "sampler":
        return 0 if task.name in ("cuda", "cuda bf16") else 2
    return 1 if "compiled" in task.name and "prior" in task.case else 2


def _compiles(engine: str) -> bool:
    """Recording a graph needs no kernel of its own, and the ``torch`` engine has none."""
    return engine in ("cuda", "cuda bf16", "naive", "naive compiled", "cuda triton rows")


def perform(task: Task) -> None:
    """Run once what a task names."""
    if task.kind == "operations":
        case = case_of(task.case)
        contender(PROBLEMS[case.operation](case), task.name).warm()
        return
    problem = Problem.of(sampler.case_of(task.case, task.batch))
    if task.name in VARIANTS:
        warm_up(problem, VARIANTS[task.name])
    else:
        other_line(problem, problem.line(task.name))


def run(some: Sequence[Task], do: Callable[[Task], None] = perform) -> None:
    """Tasks one after the other, with a line about each."""
    for task in some:
        begun, said = time.monotonic(), "done"
        try:
            do(task)
        except Exception as error:
            lines = str(error).strip().splitlines()
            said = f"{type(error).__name__}: {lines[0] if lines else ''}"
        print(f"{' '.join(map(str, task))}: {said} after {time.monotonic() - begun:.1f} s", flush=True)


def share(index: int, count: int) -> list[Task]:
    """The tasks of one of ``count`` processes."""
    return tasks()[index::count]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ahead", description=__doc__)
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="only those of process I of N")
    options = parser.parse_args(arguments)
    if options.share is not None:
        # Each compiles in one process; Inductor would start as many as there are cores.
        torch.set_num_threads(1)
        run(share(*options.share))
        return 0
    count = max(1, min(_PROCESSES, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "bench.gpu.ahead", "--share"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([*command, str(i), str(count)], cwd=ROOT, env=environment))
            for i in range(count)
        ]
    print(f"{len(tasks())} tasks in {count} processes")
    return max(process.returncode != 0 for process in processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
