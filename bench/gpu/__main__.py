"""Everything that needs a GPU, in one command: ``python -m bench.gpu --out DIR``; nine minutes at most.

Parts, in this order, each a process with a share of the time: the tests that need a GPU; what the GPU does at best
(probes); the sampler's benchmark; compute-sanitizer's memcheck and racecheck on tiny plans; the benchmarks of nearest
code and causal operations. What the time does not suffice for is named. The folder gets a log of every part,
``gpu.json`` with what became of each, and the parts' own files: ``tests.xml``, ``probes.json``, ``sampler.json`` and
``operations/*.json``. Nothing is built: install the package first,
with ``CMAKE_ARGS=-DFASTVQ_PROBES=ON`` for the probes of blocks and launches.

Exit status: 0 all parts passed; 1 one failed, did not come to its end or could not run (``--allow-missing``: a program
that is not installed is no failure); 2 there is no GPU, and nothing has been done; 64 wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import bench.peers  # noqa: F401
from bench.gpu import probes, sampler, tiny
from bench.gpu.files import aligned, load, save
from bench.gpu.lines import LEGEND, Line, both_levels, table
from bench.gpu.parts import GRACE_SECONDS, Outcome, Part, exit_status, judge_sanitizer, judge_tests, run_parts
from bench.registry import every_peer

LIMIT = 540.0
NO_GPU, WRONG_ARGUMENTS = 2, 64
FILE = "gpu.json"
# Kept for the report at the end.
_REPORT_SECONDS = 10.0
# Other processes of the test run share the GPU, which mostly waits for kernels to be compiled.
_TEST_PROCESSES = 6
# That a case of operations may take once it has begun.
_CASE_SECONDS = 25.0
# The most telling cases, in order: each takes some seconds, and most of them would not be reached.
OPERATION_CASES = (
    "bench/test_nearest_code.py::test_nearest_code[n65536-k512-d64-forward-ema-cuda]",
    "bench/test_nearest_code.py::test_nearest_code[n65536-k8192-d64-forward-cuda]",
    "bench/test_causal.py::test_causal[causal-attention-strict-width256-32x32-forward-backward-GPU-b32]",
    "bench/test_causal.py::test_causal[gated-block-rows-strict-256channels-32x32-forward-backward-GPU-b32]",
    "bench/test_nearest_code.py::test_nearest_code[n65536-k1024-d128-forward-ema-bf16-cuda]",
    "bench/test_causal.py::test_causal[causal-conv-rows-strict-256channels-32x32-forward-GPU-b32]",
    "bench/test_causal.py::test_causal[causal-attention-strict-width256-64x64-forward-GPU-b8]",
    "bench/test_causal.py::test_causal_prior[causal-prior-imagenet256-top-training-GPU-b8]",
    "bench/test_nearest_code.py::test_nearest_code[n1048576-k8192-d64-forward-cuda]",
)


def parts(out: Path) -> list[Part]:
    """All parts, the most telling first."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-p", "no:cacheprovider"]
    junit, operations = out / "tests.xml", out / "operations.xml"
    several = ["-n", str(_TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    missing = None if shutil.which("compute-sanitizer") else "not run: compute-sanitizer is not on the path"

    def checked(tool: str) -> Part:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *python, "bench.gpu.tiny", "--no-compare"]
        # Every tensor in an allocation of its own: inside PyTorch's pools an access out of bounds goes unnoticed.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(
            tool,
            lambda _: command,
            45.0,
            judge=judge_sanitizer(tiny.LAST_WORDS),
            environment=own,
            missing=missing,
        )

    return [
        Part(
            "tests",
            lambda _: [*pytest, "-m", "gpu", "-q", "-rf", *several, f"--junitxml={junit}", "tests"],
            145.0,
            judge=judge_tests(junit),
        ),
        Part("probes", lambda _: [*python, "bench.gpu.probes", "--out", str(out)], 45.0),
        Part(
            "sampler",
            lambda seconds: [*python, "bench.gpu.sampler", "--out", str(out), "--seconds", f"{seconds - 15:.0f}"],
            200.0,
            least=60.0,
        ),
        checked("memcheck"),
        checked("racecheck"),
        Part(
            "operations",
            lambda seconds: [
                *pytest,
                *("-p", "bench.gpu.deadline", "--start-within", f"{seconds - _CASE_SECONDS:.0f}"),
                *("--benchmark", "--results", str(out / "operations"), f"--junitxml={operations}"),
                *every_peer(OPERATION_CASES),
            ],
            150.0,
            least=_CASE_SECONDS + 15,
            judge=judge_tests(operations, name_skipped=True),
        ),
    ]


def report(out: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Probes, the sampler's table, and a line for every part."""
    said: list[str] = []
    if (found := load(out / probes.FILE)) is not None:
        said += [*probes.lines(found), ""]
    if (found := load(out / sampler.FILE)) is not None:
        lines = [Line(**stored) for stored in found["lines"]]
        said += [*table(lines), *both_levels(lines), *LEGEND, ""]
    return said + aligned([(one.name, one.status, f"{one.seconds:4.0f} s", one.detail) for one in outcomes])


class _Parser(argparse.ArgumentParser):
    """Wrong arguments end with a status of their own: 2 says that there is no GPU."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(WRONG_ARGUMENTS, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in parts(Path())]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for files and logs")
    parser.add_argument("--seconds", type=float, default=LIMIT, help=f"for everything, 30 to {LIMIT:.0f} (the default)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--allow-missing", action="store_true", help="a missing program is no failure")
    options = parser.parse_args(arguments)
    if not 30 <= options.seconds <= LIMIT:
        parser.error(f"--seconds: expected 30 to {LIMIT:.0f}, got {options.seconds:g}")
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
    for name in ("tests.xml", "operations.xml", probes.FILE, sampler.FILE, FILE):
        if options.only is None:
            (out / name).unlink(missing_ok=True)
    chosen = [part for part in parts(out) if options.only is None or part.name in options.only]
    outcomes = run_parts(
        chosen, out, options.seconds - _REPORT_SECONDS - GRACE_SECONDS, lambda line: print(line, flush=True)
    )
    save(
        out / FILE,
        {"seconds_limit": options.seconds, "parts": [dataclasses.asdict(outcome) for outcome in outcomes]},
    )
    print("\n".join(["", *report(out, outcomes)]))
    return exit_status(outcomes, allow_missing=options.allow_missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
