"""Everything that needs a GPU, in one command: ``python -m bench.gpu --out DIR``; nine minutes, ``--short`` four.

Parts, the most telling first, each a process with a share of the time: kernels compiled ahead, by several processes;
what the GPU does at best (probes); the sampler's benchmark; that of nearest code, residual quantisation and causal
operations; the tests that need a GPU; compute-sanitizer's memcheck and racecheck on tiny plans. ``--short`` has smaller
shares, and leaves out tests and racecheck. What the time does not suffice for is named. The folder gets, as soon as
there is anything to write, a log of every part, ``gpu.json`` with what became of each, ``summary.md``, and the parts'
own files: ``probes.json``, ``sampler.json``, ``operations.json`` and ``tests.xml``. Nothing is built: install the
package first, with ``CMAKE_ARGS=-DFASTVQ_PROBES=ON`` for the probes of blocks and launches.

Exit status: 0 all parts passed; 1 one failed, did not come to its end or could not run (``--allow-missing``: a program
that is not installed is no failure); 2 there is no GPU, and nothing has been done; 64 wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench.files import load as load_session
from bench.gpu import operations, probes, sampler, tiny
from bench.gpu.files import aligned, load, save
from bench.gpu.lines import LEGEND, Line, both_levels, table
from bench.gpu.parts import GRACE_SECONDS, Outcome, Part, exit_status, judge_sanitizer, judge_tests, run_parts
from bench.gpu.summary import table as summary
from bench.machine import Ceilings

LIMIT, SHORT_LIMIT = 540.0, 240.0
NO_GPU, WRONG_ARGUMENTS = 2, 64
FILE, SUMMARY, TESTS = "gpu.json", "summary.md", "tests.xml"
# Kept for the report at the end.
_REPORT_SECONDS = 10.0
# Seconds of each part, in order; a short run leaves out those without.
SHARES = {"ahead": 70, "probes": 25, "sampler": 135, "operations": 120, "tests": 100, "memcheck": 40, "racecheck": 35}
SHORT_SHARES = {"ahead": 40, "probes": 20, "sampler": 70, "operations": 60, "memcheck": 35}
# Of a part that is told when to begin nothing more: until what it has begun is done.
_FINISHING_SECONDS = 12.0
# Other processes of the test run share the GPU, which mostly waits for kernels to be compiled.
_MOST_TEST_PROCESSES = 12


def parts(out: Path, *, short: bool = False) -> list[Part]:
    """All parts, the most telling first."""
    python = [sys.executable, "-m"]
    shares = SHORT_SHARES if short else SHARES
    processes = max(2, min(_MOST_TEST_PROCESSES, (os.cpu_count() or 1) - 2))
    several = ["-n", str(processes)] if importlib.util.find_spec("xdist") else []
    missing = None if shutil.which("compute-sanitizer") else "not run: compute-sanitizer is not on the path"

    def timed(name: str) -> Callable[[float], list[str]]:
        """A module that is told when to start nothing more."""
        return lambda seconds: [
            *python, f"bench.gpu.{name}", "--out", str(out), "--seconds", f"{seconds - _FINISHING_SECONDS:.0f}"
        ]  # fmt: skip

    def checked(tool: str) -> Part:
        program = shutil.which("compute-sanitizer") or "compute-sanitizer"
        command = [program, "--tool", tool, "--error-exitcode", "9", *python, "bench.gpu.tiny", "--no-compare"]
        # Every tensor in an allocation of its own: inside PyTorch's pools an access out of bounds goes unnoticed.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        judge = judge_sanitizer(tiny.LAST_WORDS)
        return Part(tool, lambda _: command, shares.get(tool, 0), judge=judge, environment=own, missing=missing)

    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-q", "-rf", *several]
    every = [
        Part(
            "ahead",
            lambda seconds: [*python, "bench.gpu.ahead", "--seconds", f"{seconds:.0f}"],
            shares["ahead"],
            optional=True,
        ),
        Part("probes", lambda _: [*python, "bench.gpu.probes", "--out", str(out)], shares["probes"]),
        Part("sampler", timed("sampler"), shares["sampler"], least=2 * _FINISHING_SECONDS),
        Part("operations", timed("operations"), shares["operations"], least=2 * _FINISHING_SECONDS),
        Part(
            "tests",
            lambda _: [*pytest, f"--junitxml={out / TESTS}", "tests"],
            shares.get("tests", 0),
            judge=judge_tests(out / TESTS),
        ),
        checked("memcheck"),
        checked("racecheck"),
    ]
    return [part for part in every if part.name in shares]


def report(out: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Probes, the sampler's table, the summary, and a line for every part."""
    said: list[str] = []
    if (found := load(out / probes.FILE)) is not None:
        said += [*probes.lines(found), ""]
    lines = _sampler_lines(out)
    if lines:
        said += [*table(lines), *both_levels(lines), *LEGEND, ""]
    if rows := summarised(out):
        said += [*rows, ""]
    return said + aligned([(one.name, one.status, f"{one.seconds:4.0f} s", one.detail) for one in outcomes])


def summarised(out: Path) -> list[str]:
    """The lines of ``summary.md``."""
    path = out / operations.FILE
    session = load_session(path) if path.is_file() else None
    results, ceilings = (session.results, session.ceilings) if session else ([], Ceilings())
    return summary(_sampler_lines(out), results, ceilings)


def _sampler_lines(out: Path) -> list[Line]:
    found = load(out / sampler.FILE)
    return [] if found is None else [Line(**stored) for stored in found["lines"]]


class _Parser(argparse.ArgumentParser):
    """Wrong arguments end with a status of their own: 2 says that there is no GPU."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(WRONG_ARGUMENTS, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for files and logs")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_LIMIT:.0f} seconds: no tests, no racecheck")
    parser.add_argument("--seconds", type=float, help=f"for everything, 30 to {LIMIT:.0f} (the default)")
    parser.add_argument("--only", nargs="+", choices=SHARES, metavar="PART", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--allow-missing", action="store_true", help="a missing program is no failure")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = SHORT_LIMIT if options.short else LIMIT
    if not 30 <= options.seconds <= LIMIT:
        parser.error(f"--seconds: expected 30 to {LIMIT:.0f}, got {options.seconds:g}")
    if options.short and (left_out := [name for name in options.only or () if name not in SHORT_SHARES]):
        parser.error(f"--only: {', '.join(left_out)} are no part of a short run")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"No GPU is available to PyTorch {torch.__version__} here, so there is nothing to check; nothing was done."
        )
        return NO_GPU
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Files of an earlier run must not pass for this one's.
    for name in (TESTS, probes.FILE, sampler.FILE, operations.FILE, SUMMARY, FILE):
        if options.only is None:
            (out / name).unlink(missing_ok=True)
    every = parts(out, short=options.short)
    chosen = [part for part in every if options.only is None or part.name in options.only]

    def done(outcomes: Sequence[Outcome]) -> None:
        found = [dataclasses.asdict(outcome) for outcome in outcomes]
        save(out / FILE, {"seconds_limit": options.seconds, "parts": found})
        (out / SUMMARY).write_text("\n".join([*summarised(out), ""]))

    outcomes = run_parts(
        chosen, out, options.seconds - _REPORT_SECONDS - GRACE_SECONDS, lambda line: print(line, flush=True), done=done
    )
    print("\n".join(["", *report(out, outcomes)]))
    return exit_status(outcomes, allow_missing=options.allow_missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
