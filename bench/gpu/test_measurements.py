"""What is measured on a GPU as far as it goes without one: floors, probes, lines; the CPU's engine stands in."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.cases import SAMPLER_CASES
from bench.gpu import lines, measure, probes, sampler, tiny
from bench.gpu.files import load, save
from bench.gpu.floors import Rates, floor_seconds, phases
from bench.gpu.lines import Line
from fastvq import PixelSNAIL, _engine
from fastvq.sampling import describe

# Rates of the kind that floors are worked out with; 8 MB of shared memory.
RATES = Rates({"float32": 1e12, "bfloat16": 2e12}, 1e-6, 1e12, 4e12, cache_bytes=50_000_000, shared_bytes=8_000_000)


@pytest.fixture(scope="module")
def plan() -> Any:
    return describe(PixelSNAIL.from_preset("tiny-top", shape=(3, 4)).eval())


class TestFloors:
    def test_parts_of_a_plan(self, plan: Any) -> None:
        rows, steps = phases(plan, 10, "float32", RATES)
        assert rows == pytest.approx((10 * plan.row_flops / 1e12, 3 * plan.row_weight_bytes / 4e12, 0))
        assert steps == pytest.approx((10 * plan.step_flops / 1e12, 0, 12 * plan.levels * 1e-6))
        half, _ = phases(plan, 10, "bfloat16", RATES)
        assert half == pytest.approx((rows.arithmetic / 2, rows.reading / 2, 0))

    def test_the_longest_of_arithmetic_bytes_and_waiting_counts(self, plan: Any) -> None:
        slow = dataclasses.replace(RATES, flops={"float32": 1.0})
        assert floor_seconds(plan, 2, "float32", slow) == 2 * (plan.row_flops + plan.step_flops)
        rows, steps = phases(plan, 1, "float32", RATES, hops=10**6)
        assert floor_seconds(plan, 1, "float32", RATES, hops=10**6) == max(rows) + 12
        assert steps.waiting == 12

    def test_weights_beyond_shared_memory_are_read_at_every_position(self, plan: Any) -> None:
        small = dataclasses.replace(RATES, shared_bytes=plan.step_weight_bytes - 100)
        assert phases(plan, 1, "float32", small)[1].reading == 12 * 100 / RATES.cached

    def test_weights_beyond_the_cache_come_from_memory(self, plan: Any) -> None:
        small = dataclasses.replace(RATES, cache_bytes=plan.row_weight_bytes - 1)
        assert phases(plan, 1, "float32", small)[0].reading == 3 * plan.row_weight_bytes / RATES.copy
        assert phases(plan, 1, "bfloat16", small)[0].reading == 3 * plan.row_weight_bytes / 2 / RATES.cached

    def test_batch_1_of_the_largest_prior_waits_25_ms(self) -> None:
        # 20 layers of 256 channels, six waits per position of 0.7 us each, and the rates of an H200. For larger batches
        # only an upper end is known: sums of waiting and arithmetic, at a lower rate of products than libraries reach.
        rates = Rates({"bfloat16": 790e12}, 0.7e-6, 4.3e12, 4.3e12, cache_bytes=60_000_000, shared_bytes=132 * 232_448)
        configs = [case.config for case in SAMPLER_CASES if case.id.startswith("default-strict-") and case.batch == 1]
        plans = []
        for config in configs:
            assert config is not None
            with torch.device("meta"):
                prior = PixelSNAIL(type(config)(**{**vars(config), "layers_per_block": 5}))
            plans.append(describe(prior.to_empty(device="cpu").eval()))
        assert 0.85e12 < sum(one.row_flops + one.step_flops for one in plans) < 0.95e12

        def floor(batch: int) -> float:
            return sum(floor_seconds(one, batch, "bfloat16", rates, hops=6) for one in plans)

        assert floor(1) == pytest.approx(25e-3, rel=0.02)
        for batch, upper in ((16, 46e-3), (64, 131e-3), (256, 468e-3)):
            assert 0.6 * upper < floor(batch) < upper


FOUND = {
    "multiprocessors": 4,
    "cache_bytes": 1000,
    "shared_bytes_per_multiprocessor": 50,
    "copy_bytes_per_s": 4e12,
    "cached_copy_bytes_per_s": 6e12,
    "gpu_flops_per_s": {"cuda bfloat16": {"mm small": [1e12], "mm large": [7e14, 8e14]}},
    "microseconds": {"barrier of all blocks": [2.0, 1.0, 3.0], "flag from block to block": [0.7, 0.8, 0.6]},
}


class TestProbes:
    def test_file_table_and_rates(self, tmp_path: Path) -> None:
        path = tmp_path / "probes.json"
        assert load(path) is None
        save(path, FOUND)
        found = load(path)
        assert found is not None
        assert found["machine"]["cores"] >= 1
        said = probes.lines(found)
        assert "flag from block to block  0.700 us" in said
        assert "product, bfloat16         800.0 TFLOP/s (mm large)" in said
        assert probes.rates_of(found) == Rates({"bfloat16": 8e14}, pytest.approx(0.7e-6), 4e12, 6e12, 1000, 200)

    def test_without_the_module_there_are_no_floors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fastvq._probes", None)
        found = {name: value for name, value in FOUND.items() if name != "microseconds"} | probes.blocks_and_launches(0)
        assert probes.rates_of(found) is None
        said = next(line for line in probes.lines(found) if line.startswith("blocks and launches"))
        assert "not measured: fastvq._probes cannot be imported" in said
        assert "CMAKE_ARGS=-DFASTVQ_PROBES=ON pip install -e ." in said

    def test_what_the_module_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in = SimpleNamespace(
            barrier=lambda blocks, rounds, device: 2.0 + blocks,
            flag_hop=lambda rounds, device: 0.5 + device,
            launch=lambda count, device: (3.0, 1.0),
        )
        monkeypatch.setitem(sys.modules, "fastvq._probes", stand_in)
        found = probes.blocks_and_launches(1)["microseconds"]
        assert {name: values[0] for name, values in found.items()} == {
            "barrier of all blocks": 2.0,
            "flag from block to block": 1.5,
            "empty kernel": 3.0,
            "empty kernel in a graph": 1.0,
        }


def line(case: str, engine: str, time: float, **changes: Any) -> Line:
    return dataclasses.replace(Line(case, 1, engine, [time], [time / 2]), **changes)


class TestLines:
    def test_both_levels_together(self) -> None:
        top, bottom = line("a-top", "cuda", 3.0, floor=1.0), line("a-bottom", "cuda", 5.0, floor=1.0)
        assert lines.both_levels([top, bottom]) == [
            "a, top + bottom, batch 1, cuda: 8 s; floor 2 s, time/floor 4",
        ]
        assert lines.both_levels([top]) == []
        assert lines.both_levels([top, dataclasses.replace(bottom, passed=False)]) == []

    def test_no_ratio_for_what_failed_its_check(self) -> None:
        wrong = line("a", "cuda", 1.0, floor=0.5, passed=False, said="9 codes differ")
        naive = line("a", "naive", 9.0, extrapolated="somehow")
        good = line("a", "cuda graph", 2.0, floor=0.5)
        header, first, _, last = lines.table([wrong, naive, good])
        assert header.split()[-3:] == ["floor", "time/floor", "check"]
        assert first.split() == ["a", "1", "cuda", "1", "s", "500", "ms", "1", "-", "500", "ms", "-", "FAILED"]
        assert last.split() == ["a", "1", "cuda", "graph", "2", "s", "1", "s", "1", "4.5", "e", "500", "ms", "4", "ok"]
        assert lines.failures([wrong, naive, good]) == ["a, batch 1: cuda: 9 codes differ"]


BATCHES = {1, 16, 64, 256}
# All of them.
ENGINES = (*measure.VARIANTS, *measure._OTHERS)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not _engine.available(), reason="the cpu engine needs the extension")
class TestSampler:
    """The engine of the CPU stands in for that of the GPU."""

    @staticmethod
    def problem(engine: str = "cpu", name: str = "small-strict-top") -> measure.Problem:
        return measure.Problem.of(sampler.case_of(name, 3, small=True), "cpu", engine)

    def test_lines_and_file(self, tmp_path: Path) -> None:
        problem, told = self.problem(), []
        made = measure.run_case(problem, RATES, lambda: 30.0, told.append, ENGINES)
        assert told == made
        assert [one.engine for one in made] == list(ENGINES)
        found = {one.engine: one for one in made if one.left_out is None}
        # What else there is, the CPU has not.
        assert set(found) == {"cuda", "cuda bf16", "naive", "naive compiled", "torch"}
        assert all(one.passed for one in found.values())
        assert {name for name, one in found.items() if one.extrapolated} == {"naive", "naive compiled", "torch"}
        assert {name for name, one in found.items() if not one.exact} == {"cuda bf16"}
        assert "of codes outside the float32 margin" in found["cuda bf16"].said
        floors = {name: one.floor or 0.0 for name, one in found.items()}
        assert floors["cuda"] == floors["naive"] >= floors["cuda bf16"] >= 12 * problem.explanation.levels * RATES.hop
        assert all((one.left_out or "failed: ").startswith("failed: ") for one in made)
        save(tmp_path / "sampler.json", {"lines": [dataclasses.asdict(one) for one in made]})
        stored = load(tmp_path / "sampler.json")
        assert stored is not None
        assert [Line(**one) for one in stored["lines"]] == made

    def test_nothing_runs_on_a_device_that_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(measure.Problem, "run", broken)
        monkeypatch.setattr(measure, "synchronise", broken)
        made = measure.run_case(self.problem(), None, lambda: 9.0, print, ENGINES)
        assert not any(one.seconds for one in made)
        assert made[0].left_out == "failed: RuntimeError: an illegal memory access was encountered"
        assert {one.left_out for one in made[1:]} == {"not run: the device had failed"}
        assert len(lines.failures(made)) == len(ENGINES)

    def test_out_of_time_is_named_and_no_failure(self) -> None:
        made = measure.run_case(self.problem(), None, lambda: 0.0, print, ENGINES)
        assert {one.left_out for one in made} == {"out of time"}
        assert lines.failures(made) == []

    def test_an_engine_that_cannot_run_is_a_failure(self) -> None:
        made = measure.run_case(self.problem("cuda"), None, lambda: 0.0, print, ENGINES)
        assert len(lines.failures(made)) == len(measure.VARIANTS)

    def test_a_line_that_takes_too_long_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(problem: measure.Problem, one: Line) -> None:
            one.seconds.append(1.0)
            time.sleep(20)

        monkeypatch.setitem(measure._OTHERS, "naive", slow)
        monkeypatch.setattr(measure, "LINE_SECONDS", 0.3)
        start = time.monotonic()
        late, after = measure.run_case(self.problem(), None, lambda: 20.0, print, ("naive", "torch"))
        assert time.monotonic() - start < 15
        assert (late.left_out, late.seconds) == ("out of time", [1.0])
        assert after.engine == "torch"

    def test_runs_that_differ_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ("cuda", "cuda bf16")
        good = measure.run_case(self.problem(), None, lambda: 60.0, print, names, runs=30)
        assert [len(one.seconds) for one in good] == [30, 30]
        assert lines.failures(good) == []
        run, calls = measure.Problem.run, []

        def unsteady(problem: measure.Problem, *arguments: Any) -> torch.Tensor:
            codes = run(problem, *arguments)
            calls.append(1)  # a call that is left after its first row does not come here
            return codes.index_fill(0, torch.tensor([1]), 0) if len(calls) == 3 else codes

        monkeypatch.setattr(measure.Problem, "run", unsteady)
        bad = measure.run_case(self.problem(), None, lambda: 60.0, print, names, runs=30)
        (said,) = lines.failures(bad)
        assert said.startswith("small-strict-top, batch 3: cuda: 1 of 30 runs differ from the first; ")

    def test_the_most_telling_comes_first(self) -> None:
        jobs = [*sampler.JOBS, *sampler.REPEATED]
        first = jobs[:4]
        assert [(job.prior, job.batch) for job in first] == [
            ("default-strict-bottom", 1),
            ("default-strict-top", 1),
            ("default-strict-bottom", 64),
            ("default-strict-top", 64),
        ]
        assert all(job.engines[:2] == ("cuda", "cuda bf16") for job in first)
        assert jobs[4].prior == sampler.PIPELINE
        assert [job.prior for job in jobs[-2:]] == ["small-strict-top", "small-inclusive-bottom"]
        for job in jobs:
            assert job.prior == sampler.PIPELINE or sampler.case_of(job.prior, job.batch).config is not None
            assert set(job.engines) <= {*measure.VARIANTS, *measure._OTHERS}
        asked = {(job.prior, job.batch, engine) for job in jobs for engine in job.engines}
        assert len(asked) == sum(len(job.engines) for job in jobs)
        for prior in ("default-strict-bottom", "default-strict-top"):
            assert {batch for name, batch, engine in asked if (name, engine) == (prior, "cuda bf16")} == BATCHES
            assert {(prior, batch, "naive") for batch in (1, 64)} <= asked

    def test_jobs_are_stored_one_by_one_and_late_ones_named(self, tmp_path: Path) -> None:
        session = sampler.Session(tmp_path, RATES, {}, "cpu", "cpu", small=True)
        stored: list[int] = []
        done = session.done

        def noting(one: Line) -> None:
            done(one)
            found = load(tmp_path / sampler.FILE)
            assert found is not None
            stored.append(len(found["lines"]))

        session.done = noting  # type: ignore[method-assign]
        jobs = (
            sampler.Job("default-strict-bottom", 2, ("cuda",)),
            sampler.Job(sampler.PIPELINE, 3, ("cuda bf16",)),
            sampler.Job("default-strict-bottom", 3, ("naive",)),
        )
        repeated = (sampler.Job("small-strict-top", 3, ("cuda",)),)
        sampler.run_jobs(session, time.monotonic() + 300, jobs, repeated)
        assert stored == [1, 2, 3, 4]
        assert [one.left_out for one in session.lines] == [None] * 4
        own, images, _, again = session.lines
        assert images.said == "images are finite"
        assert not images.exact
        assert (images.floor or 0) > (own.floor or 0) > 0
        assert len(again.seconds) >= sampler.RUNS
        assert set(session.priors) == {"default-strict-bottom", "default-strict-top", "small-strict-top"}
        sampler.run_jobs(session, time.monotonic() - 1, jobs[:1], repeated)
        assert [(one.case, one.left_out) for one in session.lines[4:]] == [
            ("default-strict-bottom", "out of time"),
            ("small-strict-top", "out of time"),
        ]

    @pytest.mark.parametrize(("seconds", "most"), [(1000.0, sampler.JOB_SECONDS), (50.0, 10.0)], ids=["long", "short"])
    def test_no_job_takes_the_time_of_all(
        self, seconds: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[float] = []

        def run(session: sampler.Session, job: sampler.Job, left: measure.Left, runs: int) -> bool:
            told.append(left())
            return True

        monkeypatch.setattr(sampler.Session, "run", run)
        session = sampler.Session(tmp_path, None, {}, "cpu", "cpu", small=True)
        sampler.run_jobs(session, time.monotonic() + seconds)
        assert len(told) == len(sampler.JOBS) + len(sampler.REPEATED)
        assert all(0 < left <= most for left in told)

    def test_no_job_after_the_device_has_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        session = sampler.Session(tmp_path, None, {}, "cpu", "cpu", small=True)
        monkeypatch.setattr(measure.Problem, "run", broken)
        monkeypatch.setattr(measure, "synchronise", broken)
        jobs = [sampler.Job("small-strict-top", batch, ("cuda", "naive")) for batch in (1, 2)]
        sampler.run_jobs(session, time.monotonic() + 60, jobs, ())
        assert [one.left_out for one in session.lines[1:]] == ["not run: the device had failed", *["out of time"] * 2]


def test_tiny_plans_run_on_a_cpu(one_thread: None) -> None:
    count = tiny.run_engine("cpu", "cpu") if _engine.available() else 24
    assert count == 24
    assert tiny.run_ops("cpu", None, (None,)) == 7
