"""Sessions made by hand, for tests of what is made of recorded ones."""

from __future__ import annotations

from typing import Any

from bench.files import Session
from bench.harness import Check, Entry, Result
from bench.machine import Ceilings
from bench.recorded import Run

GOOD, BAD = Check(True, "0 of 9 codes differ"), Check(False, "3 of 9 codes differ")
WIDE_SETS, NARROW_SETS = ["avx2", "avx512f"], ["avx2"]


def entry(peer: str, *seconds: float, check: Check | None = GOOD, **rest: Any) -> Entry:
    return Entry(peer, list(seconds), check, **rest)


def result(
    *entries: Entry, operation: str = "sampling", case: str = "digits-top", batch: int = 8, **rest: Any
) -> Result:
    return Result(operation, case, batch, list(entries), **rest)


def session(
    *results: Result,
    date: str = "2026-01-02T03:04:05+00:00",
    commit: str = "abcdef0123456789",
    dirty: bool = False,
    sets: list[str] | None = None,
    quick: bool = False,
    torch: str = "2.13.0+cpu",
    **machine: Any,
) -> Session:
    """Of a processor with AVX-512 and two cores, unless said otherwise."""
    versions = {"python": "3.11.7", "torch": torch, "peers": {"faiss-cpu": "1.15.1", "monai": None}}
    caches = {"L1d": "48K" if sets is None else "32K"}
    facts = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "caches": caches, "gpus": [], **machine}
    extension = {"extension": {"instruction_sets": WIDE_SETS if sets is None else sets}}
    return Session(date, facts, {**versions, **extension}, commit, dirty, Ceilings(), list(results), 0.25, quick)


def run(name: str, *results: Result, **rest: Any) -> Run:
    return Run(name, session(*results, **rest))
