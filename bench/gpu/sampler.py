"""The sampler's engines on a GPU: ``python -m bench.gpu.sampler --out DIR --seconds N`` writes DIR/sampler.json.

Default priors (256 channels) with attention (top, 32 x 32) and without (bottom, 64 x 64: along a front): the ``cuda``
engine in float32 and bfloat16, with and without a CUDA graph; the ``torch`` engine at some steps, eager and recorded as
graphs; the naive sampler at some rows, and compiled and recorded as a graph. The most telling first, `JOBS` says what
that is; the file is written after every line. Codes of exact engines are checked against the naive model's logits.
Last, small priors are sampled again and again and must give the same codes every time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import SAMPLER_CASES, SamplerCase
from bench.gpu import probes
from bench.gpu.files import load, save
from bench.gpu.floors import Rates, floor_seconds
from bench.gpu.limit import at_most
from bench.gpu.lines import LATE, LEGEND, Line, both_levels, failures, table
from bench.gpu.measure import LINE_SECONDS, VARIANTS, Left, Problem, noted, pipeline_line, run_case
from fastvq import VQVAE2, Pipeline
from fastvq.models.prior import Prior

FILE = "sampler.json"
# Of small priors, which must give the same codes every time.
RUNS = 30
OURS = ("cuda", "cuda bf16", "cuda graph", "cuda bf16 graph")
OTHERS = ("naive", "torch")
SLOWER = ("naive compiled", "torch graph", "cuda rows")


class Job(NamedTuple):
    """Engines for a prior at a batch size."""

    prior: str
    batch: int
    engines: tuple[str, ...]


# Without attention, and with it.
_STRICT = ("default-strict-bottom", "default-strict-top")
_INCLUSIVE = ("default-inclusive-bottom", "default-inclusive-top")
PIPELINE = "64 images of 256 x 256"


def _jobs(priors: Sequence[str], batches: Sequence[int], engines: tuple[str, ...]) -> list[Job]:
    return [Job(prior, batch, engines) for batch in batches for prior in priors]


JOBS = (
    *_jobs(_STRICT, (1, 64), OURS),
    Job(PIPELINE, 64, ("cuda bf16",)),
    *_jobs(_STRICT, (1, 64), OTHERS),
    *_jobs(_STRICT, (16, 256), OURS),
    *_jobs(_STRICT, (1, 64), SLOWER),
    *_jobs(_INCLUSIVE, (1, 64), OURS),
)
REPEATED = _jobs(("small-strict-top", "small-inclusive-bottom"), (8,), tuple(VARIANTS))
# That a job may take, at most a fifth of the whole.
JOB_SECONDS = 30.0
_JOBS_AT_LEAST = 5


def case_of(name: str, batch: int, *, small: bool = False) -> SamplerCase:
    """A case of the CPU's list at another batch size, or its small twin."""
    case = next(case for case in SAMPLER_CASES if case.name == name)
    return dataclasses.replace(case, config=case.small_config if small else case.config, batch=batch)


@dataclass
class Session:
    """Jobs one after the other, and the file of what they found.

    Attributes:
        small: the small twins of priors.
    """

    folder: Path
    rates: Rates | None
    gpu_flops: Mapping[str, object]
    device: str = "cuda"
    engine: str = "cuda"
    small: bool = False
    lines: list[Line] = field(default_factory=list)
    priors: dict[str, Prior] = field(default_factory=dict)

    def done(self, line: Line) -> None:
        self.lines.append(line)
        print(f"  {line}", flush=True)
        stored = [dataclasses.asdict(line) for line in self.lines]
        save(self.folder / FILE, {"gpu_flops_per_s": self.gpu_flops, "lines": stored})

    def problem(self, name: str, batch: int) -> Problem:
        made = Problem.of(case_of(name, batch, small=self.small), self.device, self.engine, self.priors.get(name))
        self.priors[name] = made.prior
        return made

    def run(self, job: Job, left: Left, runs: int = 1) -> bool:
        """Returns whether the device still works."""
        print(f"{job.prior}, batch {job.batch}", flush=True)
        before = len(self.lines)
        if job.prior == PIPELINE:
            for engine in job.engines:
                self._pipeline(Line(job.prior, job.batch, engine), left)
        else:
            run_case(self.problem(job.prior, job.batch), self.rates, left, self.done, job.engines, runs)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return not any(line.device_failed for line in self.lines[before:])

    def late(self, job: Job) -> None:
        for engine in job.engines:
            self.done(Line(job.prior, job.batch, engine, left_out=LATE))

    def _pipeline(self, line: Line, left: Left) -> None:
        with noted(line, torch.device(self.device)), at_most(min(LINE_SECONDS, left())):
            problems = [self.problem(name, line.batch) for name in reversed(_STRICT)]
            pipeline_line(self._assembled(problems), line, self.engine)
            if self.rates is not None:
                precision = "float32" if line.exact else "bfloat16"
                plans = [problem.explanation for problem in problems]
                line.floor = sum(floor_seconds(plan, line.batch, precision, self.rates) for plan in plans)
        self.done(line)

    def _assembled(self, problems: Sequence[Problem]) -> Pipeline:
        codes = problems[0].prior.config.num_codes
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            size = {"channels": 8, "residual_channels": 4, "residual_layers": 1} if self.small else {}
            vqvae = VQVAE2.from_preset("imagenet256", num_codes=codes, **size).eval()
        return Pipeline(vqvae.to(self.device), [problem.prior for problem in problems])


def run(folder: Path, limit: float) -> int:
    """All jobs, as far as the time goes. Returns the exit status."""
    end = time.monotonic() + limit
    rates = load(folder / probes.FILE) or probes.measure()
    session = Session(folder, probes.rates_of(rates), rates["gpu_flops_per_s"])
    run_jobs(session, end)
    print("\n".join([*table(session.lines), *both_levels(session.lines), *LEGEND]))
    wrong = failures(session.lines)
    if session.rates is None:
        wrong.append("no floors: the probes of blocks are missing")
    print("\n".join(wrong) if wrong else "all checks passed")
    return 1 if wrong else 0


def run_jobs(session: Session, end: float, jobs: Sequence[Job] = JOBS, repeated: Sequence[Job] = REPEATED) -> None:
    """Jobs until the clock shows ``end``; those that come later are named."""
    works, cap = True, min(JOB_SECONDS, (end - time.monotonic()) / _JOBS_AT_LEAST)
    for job in (*jobs, *repeated):
        begun = time.monotonic()

        def left(begun: float = begun) -> float:
            return min(end, begun + cap) - time.monotonic()

        if not works or left() <= 0:
            session.late(job)
        else:
            works = session.run(job, left, RUNS if job in repeated else 1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sampler", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after this long (default: 240)")
    options = parser.parse_args(arguments)
    return run(options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
