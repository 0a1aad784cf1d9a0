"""Parts of a check, each a process with its own log and its own share of the time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bench.machine import ROOT

Status = Literal["passed", "failed", "out of time", "skipped", "missing"]
# A process that is told to stop may write what it has found so far.
GRACE_SECONDS = 5.0


class Found(NamedTuple):
    """What became of a part, and in a few words why."""

    status: Status
    detail: str


# Exit status and log of a process that came to its end.
Judge = Callable[[int, str], Found]


def by_status(status: int, log: str) -> Found:
    """Passed if the exit status is 0; the log's last line in words."""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
    return Found("passed" if status == 0 else "failed", last if status == 0 else f"exit status {status}: {last}")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        command: given the seconds it may take.
        seconds: the most it may take.
        least: it is not started with less than this left.
        judge: says whether it passed.
        environment: variables beside those of this process.
        missing: why it cannot run here, or None.
        optional: that it does not come to its end is no failure.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    seconds: float
    least: float = 10.0
    judge: Judge = by_status
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Outcome:
    name: str
    status: Status
    seconds: float
    detail: str
    optional: bool = False


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    log: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    done: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run parts one after the other until the time is used up; the rest is skipped by name. Logs go to the folder.

    Args:
        done: is told after each part what has become of all so far.
    """
    end = clock() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        left, start = end - clock(), clock()
        if part.missing is not None:
            found = Found("missing", part.missing)
        elif left < part.least:
            found = Found("skipped", f"{left:.0f} s left, it needs {part.least:.0f} s")
        else:
            share = min(part.seconds, left)
            log(f"{part.name}: at most {share:.0f} s")
            found = _run(part, share, folder / f"{part.name}.log")
        outcomes.append(Outcome(part.name, found.status, clock() - start, found.detail, part.optional))
        done(outcomes)
        log(f"{part.name}: {found.status} after {outcomes[-1].seconds:.0f} s; {found.detail}")
    return outcomes


def _run(part: Part, seconds: float, path: Path) -> Found:
    # What the process is told leaves room for stopping it.
    command = part.command(max(1.0, seconds - GRACE_SECONDS))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    with path.open("wb") as output:
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            list(command), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds - min(GRACE_SECONDS, seconds / 2))
        except subprocess.TimeoutExpired:
            stop(process)
            return Found("out of time", f"stopped after {seconds:.0f} s; what it had found is in {path.name}")
        except BaseException:
            stop(process)
            raise
    return part.judge(status, path.read_text(errors="replace"))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS / 2)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def exit_status(outcomes: Sequence[Outcome], *, allow_missing: bool) -> int:
    """0 if every part passed; with ``allow_missing`` one whose program is missing is no failure."""
    fine = {"passed", *(("missing",) if allow_missing else ())}
    counted = [outcome for outcome in outcomes if not outcome.optional]
    return 0 if counted and all(outcome.status in fine for outcome in counted) else 1


def judge_tests(junit: Path) -> Judge:
    """Passed if pytest says so and at least one test has really been run."""

    def judge(status: int, log: str) -> Found:
        if not junit.is_file():
            return Found("failed", f"exit status {status}, and no {junit.name}")
        cases = ElementTree.parse(junit).getroot().iter("testcase")
        counts = {"run": 0, "skipped": 0, "failed": 0}
        for case in cases:
            kinds = {child.tag for child in case}
            counts["skipped" if "skipped" in kinds else "run"] += 1
            counts["failed"] += bool(kinds & {"failure", "error"})
        detail = ", ".join(f"{count} {name}" for name, count in counts.items())
        if status != 0 or counts["failed"]:
            return Found("failed", f"exit status {status}: {detail}")
        return Found("passed", detail) if counts["run"] else Found("failed", f"no test has been run: {detail}")

    return judge


def judge_sanitizer(last_words: str) -> Judge:
    """Passed if the program came to its end and the sanitizer counted no errors and no hazards."""

    def judge(status: int, log: str) -> Found:
        if last_words not in log:
            return Found("failed", f"exit status {status}: the program did not come to its end")
        found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
        if not found:
            return Found("failed", f"exit status {status}: the sanitizer gave no summary")
        count = sum(int(number) for numbers in found for number in numbers if number)
        if status != 0 or count:
            return Found("failed", f"exit status {status}: {count} errors or hazards")
        return Found("passed", "no errors, no hazards")

    return judge
