"""The operations on a GPU: ``python -m bench.gpu.operations --out DIR --seconds N`` writes DIR/operations.json.

The most telling cases first, each with a cap. A case's peers run one after the other, ours first, each checked and with
the time of the device beside that of the whole call; the file, which ``python -m bench.report`` reads, is written after
each of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import bench.peers  # noqa: F401
from bench.cases import Case, case_of
from bench.clock import synchronise
from bench.files import write_json
from bench.gpu.limit import OutOfTimeError, at_most
from bench.gpu.lines import LATE
from bench.groups import Group
from bench.harness import Recorder, Result
from bench.registry import peers_of
from bench.report import tables

FILE = "operations.json"
# The first four are also in bench/results/gpu.
CASES = (
    "n65536-k512-d64-forward-ema-cuda",
    "n65536-k8192-d64-forward-cuda",
    "gated-block-rows-strict-256channels-32x32-forward-backward-GPU-b32",
    "causal-attention-strict-width256-32x32-forward-backward-GPU-b32",
    "residual-n12288-k1024-d128-q8-training-cuda",
    "causal-prior-default-top-rows-training-GPU-b16",
    "gated-block-symmetric-strict-256channels-32x32-forward-backward-GPU-b32",
    "causal-attention-strict-width256-64x64-forward-backward-GPU-b8",
    "causal-prior-default-top-symmetric-training-GPU-b16",
    "n65536-k8192-d64-forward-ema-cuda",
    "n65536-k1024-d128-forward-ema-bf16-cuda",
    "n65536-k512-d64-module-cuda",
    "causal-conv-rows-strict-256channels-32x32-forward-backward-GPU-b32",
    "n1048576-k8192-d64-forward-cuda",
)
# That a case may take, at most a quarter of the whole; and what a peer has to have left to begin.
CASE_SECONDS = 25.0
_CASES_AT_LEAST = 4
_LEAST_SECONDS = 0.5


class DeviceFailedError(Exception):
    """The GPU does not work any more in this process."""


def run(folder: Path, limit: float, cases: Sequence[str] = CASES, *, small: bool = False) -> int:
    """All cases, as far as the time goes. Returns the exit status.

    Args:
        small: their small twins, checked and not timed.
    """
    end = time.monotonic() + limit
    recorder = Recorder(quick=small, log=lambda line: print(line, flush=True))
    wrong: list[str] = []
    late: list[str] = []
    for case_id in cases:
        left = min(CASE_SECONDS, limit / _CASES_AT_LEAST, end - time.monotonic())
        if left <= 0:
            late.append(case_id)
            continue
        recorder.log(f"{case_id}: at most {left:.0f} s")
        try:
            wrong += _contest(case_of(case_id), recorder, time.monotonic() + left, folder / FILE)
        except OutOfTimeError:
            late.append(case_id)
        except DeviceFailedError as error:
            wrong.append(f"{case_id}: {error}")
            break
    recorder.log("\n".join(["", *tables(recorder.results, recorder.ceilings)]))
    recorder.log("\n".join([*(f"{case_id}: {LATE}" for case_id in late), *(wrong or ["all checks passed"])]))
    return 1 if wrong or not any(result.entries for result in recorder.results) else 0


def _contest(case: Case, recorder: Recorder, end: float, path: Path) -> list[str]:
    """Every peer of a case, and what failed in them.

    Raises:
        OutOfTimeError: there is no time for any of them.
    """
    try:
        with at_most(end - time.monotonic()):
            group = Group(case, recorder, small=recorder.quick)
    except Exception as error:
        _require_device(case)
        return [f"{case.id}: {_said(error)}"]
    wrong = []
    for name in peers_of(case):
        left = end - time.monotonic()
        try:
            if left < _LEAST_SECONDS:
                raise OutOfTimeError
            with at_most(left):
                group.run([name])
        except OutOfTimeError:
            _leave_out(group.result, name, LATE)
        except Exception as error:
            _leave_out(group.result, name, _said(error))
            # Others' libraries may lack some of theirs.
            if not isinstance(error, ImportError) or name.startswith("fastvq"):
                wrong.append(f"{case.id}: {name}: {_said(error)}")
        write_json(recorder, path)
        wrong += _failed_checks(case, group.result, name)
        _require_device(case)
    group.clear()
    return wrong


def _leave_out(result: Result, name: str, reason: str) -> None:
    if result.entry(name) is None:
        result.left_out[name] = reason


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:160]


def _failed_checks(case: Case, result: Result, name: str) -> list[str]:
    entry = result.entry(name)
    if entry is None or not (entry.exact and entry.whole) or (entry.check is not None and entry.check.passed):
        return []
    return [f"{case.id}: {name}: {'not checked' if entry.check is None else entry.check.summary}"]


def _require_device(case: Case) -> None:
    try:
        synchronise(torch.device(case.device))
    except RuntimeError as error:
        raise DeviceFailedError(_said(error)) from error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.operations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing after this long (default: 240)")
    options = parser.parse_args(arguments)
    return run(options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
