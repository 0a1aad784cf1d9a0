"""The page docs/benchmarks.md from recorded results: ``python -m bench.markdown FILE.json ... > docs/benchmarks.md``.

Where several files hold the same case, the last file named counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import Session, load
from bench.harness import Result
from bench.report import number, seconds

# Who stands for this package in each operation; "fastvq" elsewhere.
_OURS = {"sampling": "cpu"}
_INTRODUCTION = """# Benchmarks

Made from the recorded results named below, on {machine}. Every time is the median of the runs; every result was checked
against its reference in the same run, and what failed would have no ratio here. *e*: rests on a time extrapolated from
part of the work. Columns: the time; how many times faster than the best of the others and than each of them; the time
as a multiple of the floor, which is the case's arithmetic (and bytes, where weights are streamed) at the best rates
measured in that session. `pytest bench/ --benchmark --results DIR` makes such results on your machine (as does
pytest-benchmark's `--benchmark-json FILE`), and `python -m bench.markdown DIR/*.json` such tables.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.markdown", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    print(page({file.name: load(file) for file in parser.parse_args(arguments).files}), end="")


def page(sessions: Mapping[str, Session]) -> str:
    """The whole page, from the sessions by the names of their files.

    Raises:
        ValueError: the files come from different processors.
    """
    machines = list(dict.fromkeys(_machine(session.machine) for session in sessions.values()))
    if len(machines) != 1:
        raise ValueError(f"expected results of one machine, got those of {'; '.join(machines)}")
    sources = [f"[{index + 1}] {_source(session)}: {name}" for index, (name, session) in enumerate(sessions.items())]
    latest: dict[tuple[str, str, int], tuple[Result, int]] = {}
    for index, session in enumerate(sessions.values()):
        for result in session.results:
            # Runs against an earlier checkout leave the slow peers out, and do not stand for runs with them.
            kind = result.operation + (", beside an earlier commit" if result.entry("before") else "")
            latest[kind, result.case, result.batch] = (result, index + 1)
    lines = [_INTRODUCTION.format(machine=machines[0]), "\n".join(f"- {source}" for source in sources), ""]
    for operation in dict.fromkeys(key[0] for key in latest):
        lines += [
            f"## {operation.capitalize()}",
            "",
            "| case | batch | time | over the best | over each | / floor | run |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [_row(result, index) for key, (result, index) in latest.items() if key[0] == operation]
        lines.append("")
    return "\n".join(lines)


def _row(result: Result, session: int) -> str:
    ours = result.entry(_OURS.get(result.operation, "fastvq"))
    found = {} if ours is None else {e.peer: result.speedup(ours, e.peer) for e in result.entries}
    over = sorted(((peer, ratio) for peer, ratio in found.items() if ratio is not None), key=lambda item: item[1])
    if ours is None or not over:
        return f"| {result.case} | {result.batch} | not comparable | | | | [{session}] |"
    guessed = {e.peer for e in result.entries if e.extrapolated or ours.extrapolated}
    # The package's own slower forms are no rivals.
    rivals = [(peer, ratio) for peer, ratio in over if peer != "torch" or result.operation == "sampling"]
    each = ", ".join(f"{peer} {_times(peer, ratio, guessed)}" for peer, ratio in over)
    parts = [f"{e.peer} {number(ours.median / e.median)}" for e in result.entries if not e.whole]
    if parts:
        each += f"; time / {', '.join(parts)}"
    best = f"{_times(*rivals[0], guessed)} ({rivals[0][0]})" if rivals else "-"
    floor = result.floor_seconds
    cells = [result.case, result.batch, seconds(ours.median), best, each, number(ours.median / floor) if floor else "-"]
    return f"| {' | '.join(map(str, cells))} | [{session}] |"


def _times(peer: str, ratio: float, guessed: set[str]) -> str:
    return number(ratio) + (" e" if peer in guessed else "")


def _machine(machine: dict[str, Any]) -> str:
    gpus = machine.get("gpus") or []
    return f"{machine['cpu']}, {machine['cores']} cores" + (f", {', '.join(map(str, gpus))}" if gpus else "")


def _source(session: Session) -> str:
    versions = session.versions
    sets = (versions.get("extension") or {}).get("instruction_sets", [])
    widest = next((f", {name}" for name in ("avx512f", "avx2") if name in sets), "")
    peers = ", ".join(f"{name} {version}" for name, version in versions.get("peers", {}).items() if version)
    return (
        f"{session.date[:10]}, commit {(session.commit or 'unknown')[:8]}{' with changes' if session.dirty else ''},"
        f" Python {versions['python']}, PyTorch {versions['torch']}{', ' + peers if peers else ''}{widest}"
    )


if __name__ == "__main__":
    main()
