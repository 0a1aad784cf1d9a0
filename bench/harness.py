"""What every benchmark is made of: peers timed in turns, checks, work and memory.

The session's :class:`Recorder` has a :class:`Result` per case; tables, ratios and files are made from these alone. A
ratio exists only between entries that are exact and whose check has passed in this run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bench.clock import Timed, clock
from bench.machine import CPU_FLOAT32, ROOT, Ceilings, describe_commit, load_average

# Peers run until they have used about this long each, at least once and at most MOST_REPEATS times.
TARGET_SECONDS = 3.0
MOST_REPEATS = 25
# Below this a median of at least three runs is affordable whatever the target.
SHORT_SECONDS = 8.0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Peer:
    """Something to be timed: it must be warm, and leave no work running on the CPU when it returns.

    Attributes:
        run: gives the result, or :class:`bench.clock.Timed` where another process had the clock.
        expected: seconds that one run is thought to take; decides how often it is repeated.
        threads: PyTorch's number of threads while it runs.
        prepare: called before every run, outside of its time.
        device: where its work runs; that of a GPU is waited for.
    """

    name: str
    run: Callable[[], object]
    expected: float
    threads: int
    prepare: Callable[[], object] = _nothing
    device: str = "cpu"


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
        whole: False for a part of the operation, timed for orientation: the others' times are shown as multiples of
            its time, and it is no faster or slower than anything.
        extrapolated: how the time was extrapolated; None if it was measured in full.
        remarks: what the table should say about it.
    """

    peer: str
    seconds: list[float]
    check: Check | None
    exact: bool = True
    whole: bool = True
    extrapolated: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rounds(self) -> int:
        """How often it ran, whether or not every time was kept."""
        return int(self.facts.get("statistics", {}).get("rounds", len(self.seconds)))

    @property
    def comparable(self) -> bool:
        return self.exact and self.whole and self.check is not None and self.check.passed


@dataclass(frozen=True)
class Work:
    """A part of the least that has to be done: arithmetic, or reading ``bytes`` from a working set again and again.

    ``unit`` is where the arithmetic is done and in which type, as in `Ceilings.rate_of`.
    """

    what: str
    flops: float
    bytes: float = 0.0
    working_set: int = 0
    unit: str = CPU_FLOAT32

    def seconds(self, ceilings: Ceilings) -> float:
        reading = self.bytes / ceilings.bandwidth(self.working_set) if self.bytes else 0.0
        return max(self.flops / ceilings.rate_of(self.unit), reading)


@dataclass(frozen=True)
class Memory:
    """Bytes beyond the model and inputs: the peak in a fresh process, and the prediction if there is one."""

    peer: str
    measured: int
    predicted: int | None = None


@dataclass
class Result:
    """All that is known about a case. ``work`` is done one part after the other; ``floor`` is the time it takes.

    Attributes:
        left_out: peers that were not run, each with the reason.
        floor_seconds: as it was worked out in the session that this was read from.
    """

    operation: str
    case: str
    batch: int
    entries: list[Entry]
    work: list[Work] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    floor_seconds: float | None = None

    def entry(self, peer: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.peer == peer), None)

    def floor(self, ceilings: Ceilings) -> float | None:
        return sum(part.seconds(ceilings) for part in self.work) if self.work else self.floor_seconds

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
        source: commit and whether files had changed, before results are written beside them.
    """

    quick: bool
    log: Callable[[str], None]
    ceilings: Ceilings = field(default_factory=Ceilings)
    load: float = field(default_factory=load_average)
    source: dict[str, Any] = field(default_factory=describe_commit)
    results: list[Result] = field(default_factory=list)


def repeats(expected: float) -> int:
    """How often something that takes this long is run."""
    least = 3 if expected < SHORT_SECONDS else 1
    return max(least, min(MOST_REPEATS, int(TARGET_SECONDS / max(expected, 1e-9))))


class Runs(NamedTuple):
    """By peer: seconds of every repeat, and the last result."""

    seconds: dict[str, list[float]]
    results: dict[str, object]


def measure(peers: Sequence[Peer], *, quick: bool = False) -> Runs:
    """Times of every repeat and the last result of every peer.

    Peers take turns, so that a machine that drifts drifts for all of them; those with fewer repeats are spread evenly
    over the rounds.
    """
    with contextlib.nullcontext() if quick else _old_objects_aside():
        return _measure(peers, quick)


def _measure(peers: Sequence[Peer], quick: bool) -> Runs:
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
            if not quick:
                gc.collect()
            with using_threads(peer.threads):
                peer.prepare()
                once = clock(peer.run, device=torch.device(peer.device))
            if isinstance(once.result, Timed):
                once = once.result
            results[peer.name] = once.result
            seconds[peer.name].append(once.seconds)
    return Runs(seconds, results)


@contextlib.contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Collecting garbage inside the block looks at what was made inside it: all of PyTorch takes longer than a run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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


def return_freed_memory() -> None:
    """Give what the C library keeps of freed memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def fresh_process(
    peer: str, *arguments: str, small: bool = False, environment: Mapping[str, str] | None = None
) -> Memory:
    """What ``python -m bench.memory`` finds out about a peer, with more variables in its environment."""
    command = [sys.executable, "-m", "bench.memory", *arguments, *(["--small"] if small else [])]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr}")
    return Memory(peer, **json.loads(done.stdout.splitlines()[-1]))


def timed(run: Callable[..., object], *arguments: Any, device: str = "cpu") -> float:
    """Seconds that a call takes, its work on the device included."""
    return clock(run, *arguments, device=torch.device(device)).seconds
