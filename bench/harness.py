"""What every benchmark is made of: cases, peers timed in turns, checks, work and memory.

A benchmark makes a :class:`Result` per case and hands it to the session's :class:`Recorder`; tables, ratios and files
are made from these alone. A ratio exists only between entries that are exact and whose check has passed in this run.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.machine import Ceilings, load_average

# Peers run until they have used about this long each, at least once and at most MOST_REPEATS times.
TARGET_SECONDS = 3.0
MOST_REPEATS = 25
# Below this a median of at least three runs is affordable whatever the target.
SHORT_SECONDS = 8.0


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: an operation on inputs of a given kind and batch size."""

    operation: str
    name: str
    batch: int

    @property
    def id(self) -> str:
        return f"{self.name}-b{self.batch}"


@dataclass(frozen=True)
class Peer:
    """Something to be timed: it must be warm, and leave no work running when it returns.

    Attributes:
        expected: seconds that one run is thought to take; decides how often it is repeated.
        threads: PyTorch's number of threads while it runs.
    """

    name: str
    run: Callable[[], object]
    expected: float
    threads: int


@dataclass(frozen=True)
class Check:
    """Whether a peer computes what the reference does, and in a few words how that was found out."""

    passed: bool
    summary: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Entry:
    """What was found out about one peer in one case.

    Attributes:
        seconds: of every repeat, or the one figure of an extrapolation.
        check: against the reference; an entry without one is not compared.
        exact: False for modes that do not promise the reference's result; they are never compared with exact ones.
        extrapolated: how the time was extrapolated; None if it was measured in full.
    """

    peer: str
    seconds: list[float]
    check: Check | None
    exact: bool = True
    extrapolated: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def comparable(self) -> bool:
        return self.exact and self.check is not None and self.check.passed


@dataclass(frozen=True)
class Work:
    """A part of the least that has to be done: arithmetic, or reading ``bytes`` from a working set again and again."""

    what: str
    flops: float
    bytes: float = 0.0
    working_set: int = 0

    def seconds(self, ceilings: Ceilings) -> float:
        reading = self.bytes / ceilings.bandwidth(self.working_set) if self.bytes else 0.0
        return max(self.flops / ceilings.rate, reading)


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the model: the peak in a fresh process, and the prediction."""

    peer: str
    measured: int
    predicted: int


@dataclass
class Result:
    """All that is known about a case. ``work`` is done one part after the other; ``floor`` is the time it takes."""

    operation: str
    case: str
    batch: int
    entries: list[Entry]
    work: list[Work] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def entry(self, peer: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.peer == peer), None)

    def floor(self, ceilings: Ceilings) -> float | None:
        return sum(part.seconds(ceilings) for part in self.work) if self.work else None

    def speedup(self, entry: Entry, over: str) -> float | None:
        """How many times faster an entry is than a peer; None unless both are exact and have been checked."""
        other = self.entry(over)
        if other is None or other is entry or not (entry.comparable and other.comparable):
            return None
        return other.median / entry.median


@dataclass
class Recorder:
    """The results of a session.

    Attributes:
        quick: smoke run: inputs are shrunk, timings mean nothing and are not reported.
        log: where a line about progress goes.
        load: of the machine before the first case; figures of a machine that was not idle are worth little.
    """

    quick: bool
    log: Callable[[str], None]
    ceilings: Ceilings = field(default_factory=Ceilings)
    load: float = field(default_factory=load_average)
    results: list[Result] = field(default_factory=list)


def repeats(expected: float) -> int:
    """How often something that takes this long is run."""
    least = 3 if expected < SHORT_SECONDS else 1
    return max(least, min(MOST_REPEATS, int(TARGET_SECONDS / max(expected, 1e-9))))


def measure(peers: Sequence[Peer], *, quick: bool = False) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Times of every repeat and the last result of every peer.

    Peers take turns, so that a machine that drifts drifts for all of them; those with fewer repeats are spread evenly
    over the rounds.
    """
    counts = {peer.name: 1 if quick else repeats(peer.expected) for peer in peers}
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    results: dict[str, object] = {}
    rounds = max(counts.values(), default=0)
    for turn in range(rounds):
        for peer in peers:
            count = counts[peer.name]
            idle = (turn + 1) * count // rounds == turn * count // rounds
            # Something else on the machine can make a run take far longer than expected.
            if idle or sum(seconds[peer.name]) > 5 * max(TARGET_SECONDS, peer.expected):
                continue
            results.pop(peer.name, None)
            gc.collect()
            with using_threads(peer.threads):
                start = time.perf_counter()
                results[peer.name] = peer.run()
                seconds[peer.name].append(time.perf_counter() - start)
    return seconds, results


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """PyTorch's threads inside the block, started before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch.zeros(1 << 18).sum()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(run: Callable[..., object], *arguments: Any) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start
