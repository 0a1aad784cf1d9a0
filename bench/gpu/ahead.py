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

import bench.peers  # noqa: F401
from bench.cases import case_of
from bench.gpu import operations, sampler
from bench.gpu.measure import VARIANTS, Problem, other_line, warm_up
from bench.machine import ROOT
from bench.registry import PEERS, PROBLEMS, contender, peers_of

# At most; each holds a context of some hundred megabytes on the GPU.
_PROCESSES = 12


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
    return engine in ("cuda", "cuda bf16", "naive", "naive compiled")


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


def in_processes(module: str, tasks: int, seconds: float, *arguments: str) -> list[int]:
    """Run a module with ``--share I N`` in N processes, and end them after so many seconds. Returns their statuses.

    Args:
        arguments: of the module, beside these.
    """
    count = max(1, min(_PROCESSES, tasks, (os.cpu_count() or 1) - 2))
    # Inductor would start as many processes as there are cores, in each.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    end = time.monotonic() + seconds
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--share", str(i), str(count), *arguments], cwd=ROOT, env=environment
        )
        for i in range(count)
    ]
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ahead", description=__doc__)
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="only those of process I of N")
    parser.add_argument("--seconds", type=float, default=60.0, help="until processes are ended (default: 60)")
    options = parser.parse_args(arguments)
    if options.share is not None:
        run(share(*options.share))
        return 0
    statuses = in_processes("bench.gpu.ahead", len(tasks()), options.seconds)
    print(f"{len(tasks())} tasks in {len(statuses)} processes, {statuses.count(0)} of which came to their end")
    return 0 if all(status == 0 for status in statuses) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
