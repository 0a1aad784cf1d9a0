"""Recorded runs, and which of them counts for what.

Of a case on a machine the newest run counts that has all peers wanted there (`WANTED`, as far as any run has them); a
run of a tree with uncommitted changes only where there is no other, and it is marked. Runs beside an earlier checkout
of fastvq stand for themselves. A ratio is that of two peers in one run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.files import Session, load
from bench.harness import Entry, Result
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
# Processors hide their models; first-level caches tell them apart.
WIDE = "AMD EPYC with AVX-512, 48K of L1, 2 cores"
WIDE_BEFORE = "AMD EPYC with AVX-512, 32K of L1, 2 cores"
NARROW = "AMD EPYC with AVX2, 32K of L1, 2 cores"
GPU = "NVIDIA H200"
# In the order in which pages show them, with names for columns.
MACHINES = {WIDE: "CPU, AVX-512", WIDE_BEFORE: "CPU, AVX-512, 32K", NARROW: "CPU, AVX2", GPU: "H200"}
# Files that do not count, though they can be read.
LEFT_OUT = {
    "gpu/2026-11-26-h200-sampler.json": "the engine sampled every prior position by position then",
    "gpu/2026-11-26-h200-operations.json": "all of its cases were measured again",
    "gpu/2026-11-27-h200-d8ea3c9-sampler.json": "the engine has changed; a2d18a8 measured all but batch 16 again",
}
# Peers without which a newer run does not replace an older one.
WANTED = {
    "sampling": ("cpu", "cuda", "naive", "torch"),
    "own prior": ("its own sampler",),
    "nearest code": ("eager", "vector-quantize-pytorch"),
    "quantiser module": ("vector-quantize-pytorch",),
    "residual quantiser": ("vector-quantize-pytorch",),
}
# As pages show operations; others follow.
ORDER = (
    "sampling",
    "default call",
    "pipeline call",
    "own prior",
    "nearest code",
    "quantiser module",
    "residual quantiser",
    "accelerated quantiser",
    "causal conv",
    "gated block",
    "causal attention",
    "causal prior",
    "row product",
)
# Who stands for this package: the first that there is.
OURS = ("cpu", "cuda", "accelerated", "fastvq")
# Its own slower forms are no rivals but in sampling, where `torch` is another way to do it.
NO_RIVALS = ("torch", "levels in turn", "cuda graph")
BEFORE = "before"
BESIDE = ", beside an earlier commit"


@dataclass(frozen=True)
class Claim:
    """A row of the table of what was measured.

    Attributes:
        what: in the reader's words.
        over: the peer that it is compared with; None for the best of the rivals.
        against: what that is called, where its name does not say it.
        machines: where it may have been measured; the first that has it is shown.
    """

    what: str
    operation: str
    case: str
    batch: int
    over: str | None
    against: str = ""
    machines: tuple[str, ...] = (WIDE, WIDE_BEFORE, NARROW)


_NAIVE = ("naive", "naive sampler")
_VQP = "vector-quantize-pytorch"
CLAIMS = (
    Claim("8 grids of 16 x 16, prior with attention, 64 channels", "sampling", "small-strict-top", 8, *_NAIVE),
    Claim("8 grids of 32 x 32, 64 channels", "sampling", "small-strict-bottom", 8, *_NAIVE),
    Claim("1 grid of 64 x 64, 256 channels", "sampling", "default-strict-bottom", 1, *_NAIVE),
    Claim("8 grids of 64 x 64, 256 channels", "sampling", "default-strict-bottom", 8, *_NAIVE),
    Claim("8 grids of 32 x 32, a gated PixelCNN of one's own", "own prior", "gated PixelCNN", 8, "its own sampler"),
    Claim("nearest code + EMA, N 65536, K 512, D 64", "nearest code", "K 512, D 64, forward + EMA", 65536, None),
    Claim("8 residual levels, N 12288, K 1024", "residual quantiser", "K 1024, D 128, Q 8, training", 12288, _VQP),
    Claim(
        "`VectorQuantize` accelerated, N 65536, K 512",
        "accelerated quantiser",
        "VectorQuantize, N 65536, K 512",
        65536,
        "as it is",
    ),
    Claim("1 grid of 64 x 64, 256 channels", "sampling", "default-strict-bottom", 1, *_NAIVE, (GPU,)),
    Claim("1 grid of 32 x 32, attention, 256 channels", "sampling", "default-strict-top", 1, *_NAIVE, (GPU,)),
    Claim("nearest code, N 65536, K 8192", "nearest code", "K 8192, D 64, forward, GPU", 65536, None, "", (GPU,)),
    Claim(
        "nearest code + EMA, N 65536, K 512, D 64",
        "nearest code",
        "K 512, D 64, forward + EMA, GPU",
        65536,
        None,
        "",
        (GPU,),
    ),
    Claim(
        "8 residual levels, N 12288, K 1024",
        "residual quantiser",
        "K 1024, D 128, Q 8, training, GPU",
        12288,
        _VQP,
        "",
        (GPU,),
    ),
    Claim(
        "training step of a prior with 256 channels, 32 x 32, batch 16",
        "causal prior",
        "default-top-rows, training, GPU",
        16,
        None,
        "",
        (GPU,),
    ),
)


def ours(result: Result) -> Entry | None:
    """The entry that stands for this package."""
    return next((entry for name in OURS if (entry := result.entry(name)) is not None), None)


def best_rival(result: Result) -> Entry | None:
    """The quickest of the others whose result is right."""
    mine = ours(result)
    rivals = [entry for entry in result.entries if entry is not mine and entry.comparable and is_rival(result, entry)]
    return min(rivals, key=lambda entry: entry.median, default=None)


def is_own(peer: str) -> bool:
    """Whether it is code of this package that runs, under that name or a longer one."""
    return any(peer == name or peer.startswith(f"{name} ") for name in (*OURS, *NO_RIVALS, "naive", BEFORE))


def is_rival(result: Result, entry: Entry) -> bool:
    return entry.peer not in NO_RIVALS or (entry.peer == "torch" and result.operation == "sampling")


def machine_of(session: Session) -> str:
    """Its GPUs, or its processor with the widest vectors that the extension found, first cache and cores."""
    if gpus := session.machine.get("gpus"):
        return ", ".join(map(str, gpus))
    sets = instruction_sets(session)
    vectors = next((f" with {name}" for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in sets), "")
    cache = session.machine.get("caches", {}).get("L1d")
    first = f", {cache} of L1" if cache else ""
    return f"{session.machine['cpu']}{vectors}{first}, {session.machine['cores']} cores"


def instruction_sets(session: Session) -> list[str]:
    """What the extension found, if there was one."""
    extension = session.versions.get("extension")
    return list(extension.get("instruction_sets", [])) if isinstance(extension, dict) else []


@dataclass(frozen=True)
class Run:
    """A file of recorded results; ``name`` is its path below ``bench/results``."""

    name: str
    session: Session

    @functools.cached_property
    def machine(self) -> str:
        return machine_of(self.session)

    @property
    def commit(self) -> str:
        """Such as ``1dafd380 with changes``."""
        return f"{(self.session.commit or 'unknown')[:8]}{' with changes' if self.session.dirty else ''}"

    @property
    def versions(self) -> str:
        """Of PyTorch and Python."""
        return f"PyTorch {self.session.versions['torch']}, Python {self.session.versions['python']}"

    def source(self) -> str:
        """Machine, versions, commit and date."""
        return f"{self.machine}; {self.versions}; commit {self.commit}, {self.session.date[:10]}"


class Found(NamedTuple):
    """A result, and the run that it is of."""

    result: Result
    run: Run


Key = tuple[str, str, int]


class Recorded:
    """Runs, and for every machine the result that counts of each case."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: run.session.date)
        self.machines = list(dict.fromkeys(run.machine for run in self.runs))

    @functools.cached_property
    def _counting(self) -> dict[str, dict[Key, Found]]:
        found: dict[str, dict[Key, list[Found]]] = {machine: {} for machine in self.machines}
        for run in self.runs:
            for result in run.session.results:
                kind = result.operation + (BESIDE if result.entry(BEFORE) else "")
                key = kind, result.case, result.batch
                if result.entries:
                    found[run.machine].setdefault(key, []).append(Found(result, run))
        return {machine: _in_order(cases) for machine, cases in found.items()}

    def of(self, machine: str) -> Mapping[Key, Found]:
        """By operation, case and batch: the results that count there."""
        return self._counting.get(machine, {})

    def find(self, machine: str, operation: str, case: str, batch: int) -> Found | None:
        return self.of(machine).get((operation, case, batch))


def _in_order(cases: Mapping[Key, Sequence[Found]]) -> dict[Key, Found]:
    """The result that counts of each case: cases of an operation as they first came, batches from small to large."""
    operations = list(dict.fromkeys([*ORDER, *(operation for operation, _, _ in cases)]))
    names = list(dict.fromkeys(name for _, name, _ in cases))
    keys = sorted(cases, key=lambda key: (operations.index(key[0]), names.index(key[1]), key[2]))
    return {key: _counts(key[0], cases[key]) for key in keys}


def _counts(operation: str, results: Sequence[Found]) -> Found:
    """The one that counts of runs of a case, the newest last."""
    wanted = [name for name in WANTED.get(operation, ()) if any(one.result.entry(name) for one in results)]
    # A wrong result is no reason to show an older one: whether its check passed does not matter here.
    whole = [one for one in results if all(one.result.entry(name) for name in wanted)] or results
    return next((one for one in reversed(whole) if not one.run.session.dirty), whole[-1])


def recorded_files(folder: Path = RESULTS) -> list[Path]:
    """All that can be read, in `folder` and its folder ``gpu``."""
    kinds = ("*.json", "gpu/*-sampler.json", "gpu/*-operations.json")
    return sorted(path for kind in kinds for path in folder.glob(kind))


def recorded(folder: Path = RESULTS) -> Recorded:
    """All of them that count."""
    names = {path.relative_to(folder).as_posix(): path for path in recorded_files(folder)}
    return Recorded([Run(name, load(path)) for name, path in names.items() if name not in LEFT_OUT])
