"""The GPU check as far as it goes without a GPU: floors, tables, files, arguments, and the cases on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_probes, gpu_report, gpu_sampler, gpu_tiny
from bench.cases import CASES, SAMPLER_CASES
from bench.files import write_json
from bench.gpu_floors import DeviceWork, GpuRates, floor_seconds, work_of
from bench.gpu_parts import Outcome, Part
from bench.harness import Check, Entry, Recorder, Result
from bench.machine import Ceilings
from fastvq import PixelSNAIL, _engine
from fastvq.sampling import describe

# Rates of the kind that floors are worked out with; 8 MB of shared memory.
RATES = GpuRates(hop=1e-6, copy=1e12, cached=4e12, cache_bytes=50_000_000, shared_bytes=8_000_000)


def ceilings(**flops: float) -> Ceilings:
    made = Ceilings()
    made.gpu = {f"cuda {name}": {"made up": [rate]} for name, rate in flops.items()}
    return made


@pytest.fixture(scope="module")
def tiny() -> Any:
    return describe(PixelSNAIL.from_preset("tiny-top", shape=(3, 4)).eval())


class TestFloors:
    def test_the_longest_of_arithmetic_bytes_and_waiting_counts(self) -> None:
        work = DeviceWork("w", 4e12, 2e12, unit="cuda bfloat16", rate=1e12, waits=1000, wait_seconds=1e-3)
        assert work.seconds(ceilings(bfloat16=1e12)) == 4
        assert work.seconds(ceilings(bfloat16=4e12)) == 2
        assert floor_seconds([work, work], ceilings(bfloat16=4e12)) == 4
        long = DeviceWork("w", 4e12, 2e12, unit="cuda bfloat16", rate=1e12, waits=7000, wait_seconds=1e-3)
        assert long.seconds(ceilings(bfloat16=1e12)) == 7

    def test_parts_of_a_plan(self, tiny: Any) -> None:
        rows, steps = work_of(tiny, 10, "float32", RATES)
        assert rows.flops == 10 * tiny.row_flops
        assert rows.bytes == 3 * tiny.row_weight_bytes
        assert rows.waits == 0
        assert steps.flops == 10 * tiny.step_flops
        assert (steps.bytes, steps.waits) == (0, 12 * tiny.levels)
        assert {rows.unit, steps.unit} == {"cuda float32"}
        half, _ = work_of(tiny, 10, "bfloat16", RATES)
        assert (half.bytes, half.unit) == (rows.bytes / 2, "cuda bfloat16")

    def test_weights_beyond_shared_memory_are_read_at_every_position(self, tiny: Any) -> None:
        room = tiny.step_weight_bytes - 100
        small = GpuRates(RATES.hop, RATES.copy, RATES.cached, RATES.cache_bytes, room)
        _, steps = work_of(tiny, 1, "float32", small)
        assert steps.bytes == 12 * 100
        assert steps.rate == RATES.cached

    def test_weights_beyond_the_cache_come_from_memory(self, tiny: Any) -> None:
        small = GpuRates(RATES.hop, RATES.copy, RATES.cached, tiny.row_weight_bytes - 1, RATES.shared_bytes)
        assert work_of(tiny, 1, "float32", small)[0].rate == RATES.copy
        assert work_of(tiny, 1, "bfloat16", small)[0].rate == RATES.cached

    def test_batch_1_of_the_largest_prior_waits_25_ms(self) -> None:
        # 20 layers of 256 channels, six waits per position of 0.7 us each, and the rates of an H200. For larger batches
        # only an upper end is known: sums of waiting and arithmetic, at a lower rate of products than libraries reach.
        rates = GpuRates(hop=0.7e-6, copy=4.3e12, cached=4.3e12, cache_bytes=60_000_000, shared_bytes=132 * 232_448)
        made = ceilings(bfloat16=790e12)
        configs = [case.config for case in SAMPLER_CASES if case.id.startswith("default-strict-") and case.batch == 1]
        explanations = []
        for config in configs:
            assert config is not None
            fields = {**vars(config), "layers_per_block": 5}
            with torch.device("meta"):
                prior = PixelSNAIL(type(config)(**fields))
            explanations.append(describe(prior.to_empty(device="cpu").eval()))
        assert 0.85e12 < sum(one.row_flops + one.step_flops for one in explanations) < 0.95e12

        def floor(batch: int) -> float:
            return sum(
                floor_seconds(list(work_of(one, batch, "bfloat16", rates, hops=6)), made) for one in explanations
            )

        assert floor(1) == pytest.approx(25e-3, rel=0.02)
        for batch, upper in ((16, 46e-3), (64, 131e-3), (256, 468e-3)):
            assert 0.6 * upper < floor(batch) < upper


def probes() -> dict[str, Any]:
    return {
        "multiprocessors": 4,
        "cache_bytes": 1000,
        "shared_bytes_per_multiprocessor": 50,
        "copy_bytes_per_s": 4e12,
        "cached_copy_bytes_per_s": 6e12,
        "gpu_flops_per_s": {"cuda bfloat16": {"mm small": [1e12], "mm large": [7e14, 8e14]}},
        "microseconds": {"barrier of all blocks": [2.0, 1.0, 3.0], "flag from block to block": [0.7, 0.8, 0.6]},
    }


class TestProbes:
    def test_file_and_table(self, tmp_path: Path) -> None:
        assert gpu_probes.load(tmp_path) is None
        gpu_probes.save(probes(), tmp_path)
        found = gpu_probes.load(tmp_path)
        assert found is not None
        assert found["machine"]["cores"] >= 1
        lines = gpu_probes.lines(found)
        assert "flag from block to block  0.700 us" in lines
        assert "product, bfloat16         800.0 TFLOP/s (mm large)" in lines
        rates = gpu_probes.rates_of(found)
        assert rates == GpuRates(pytest.approx(0.7e-6), 4e12, 6e12, 1000, 200)

    def test_without_the_extension_there_are_no_floors(self) -> None:
        found = {name: value for name, value in probes().items() if name != "microseconds"} | {"missing": "no CUDA"}
        assert gpu_probes.rates_of(found) is None
        assert "blocks and launches    not measured: no CUDA" in gpu_probes.lines(found)


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not _engine.available(), reason="the cpu engine needs the extension")
class TestSampler:
    """The engine of the CPU stands in for that of the GPU."""

    def test_case_table_and_file(self, tmp_path: Path) -> None:
        recorder = Recorder(quick=False, log=print)
        recorder.ceilings = ceilings(float32=1e12, bfloat16=2e12)
        problem = gpu_sampler.Problem.of(gpu_sampler.case_of("small-strict-top", 3, small=True), "cpu")
        result = gpu_sampler.run_case(problem, recorder, RATES, lambda: 0.5, engine="cpu")
        found = {entry.peer: entry for entry in result.entries}
        assert set(found) == {"cuda", "cuda bf16", "naive", "torch"}
        assert found["cuda"].comparable
        assert found["naive"].extrapolated
        assert found["torch"].extrapolated
        assert not found["cuda bf16"].exact
        assert found["cuda bf16"].check is None
        floors = {name: entry.facts["floor_seconds"] for name, entry in found.items()}
        assert floors["cuda"] == floors["naive"] >= floors["cuda bf16"] >= 12 * problem.explanation.levels * RATES.hop
        for name in ("cuda graph", "cuda bf16 graph", "cuda triton rows", "torch graph"):
            assert result.left_out[name].startswith("failed: ")
        recorder.results.append(result)
        write_json(recorder, tmp_path / "sampler.json")
        stored = json.loads((tmp_path / "sampler.json").read_text())
        assert stored["results"][0]["entries"][0]["facts"]["floor_seconds"] == floors["cuda"]
        assert gpu_report.summary(stored) == gpu_report.table(recorder.results)

    def test_both_levels_together(self) -> None:
        def result(level: str, time: float, check: Check | None) -> Result:
            return Result(
                "sampling on a GPU", f"a-{level}", 1, [Entry("cuda", [time], check, facts={"floor_seconds": 1})]
            )

        good = Check(True, "fine")
        assert gpu_report.both_levels([result("top", 3.0, good), result("bottom", 5.0, good)]) == [
            "a, top + bottom, batch 1, cuda: 8 s; floor 2 s, time/floor 4",
        ]
        assert gpu_report.both_levels([result("top", 3.0, good)]) == []
        assert gpu_report.both_levels([result("top", 3.0, good), result("bottom", 5.0, Check(False, "bad"))]) == []

    def test_nothing_runs_on_a_device_that_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        problem = gpu_sampler.Problem.of(gpu_sampler.case_of("small-strict-top", 3, small=True), "cpu")
        monkeypatch.setattr(gpu_sampler.Problem, "run", broken)
        monkeypatch.setattr(gpu_sampler, "synchronise", broken)
        result = gpu_sampler.run_case(problem, Recorder(quick=True, log=print), None, lambda: 1.0, engine="cpu")
        assert gpu_sampler.DEVICE_FAILED in result.facts
        assert result.entries == []
        assert result.left_out["naive"] == "not run: the device had failed"
        assert len(gpu_report.failures([result])) == len(gpu_sampler.ORDER)

    def test_out_of_time_is_named_and_no_failure(self) -> None:
        problem = gpu_sampler.Problem.of(gpu_sampler.case_of("small-strict-top", 3, small=True), "cpu")
        result = gpu_sampler.run_case(problem, Recorder(quick=True, log=print), None, lambda: 0.0, engine="cpu")
        assert result.left_out == dict.fromkeys(gpu_sampler.ORDER, "out of time")
        assert gpu_report.failures([result]) == []

    def test_an_engine_that_cannot_run_is_a_failure(self) -> None:
        problem = gpu_sampler.Problem.of(gpu_sampler.case_of("small-strict-top", 3, small=True), "cpu")
        left = iter([0.0, 0.0, 0.0])
        result = gpu_sampler.run_case(problem, Recorder(quick=True, log=print), None, lambda: next(left), engine="cuda")
        assert len(gpu_report.failures([result])) == len(gpu_sampler.VARIANTS)

    def test_runs_that_differ_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        good = gpu_sampler.repeatability("small-strict-top", "cpu", "cpu", runs=3, small=True)
        assert gpu_report.failures([good]) == []
        assert [entry.check.facts["runs"] for entry in good.entries if entry.check] == [3] * len(gpu_sampler.VARIANTS)
        run, calls = gpu_sampler.Problem.run, []

        def unsteady(problem: gpu_sampler.Problem, *arguments: Any) -> torch.Tensor:
            calls.append(1)
            codes = run(problem, *arguments)
            return codes.index_fill(0, torch.tensor([1]), 0) if len(calls) == 3 else codes

        monkeypatch.setattr(gpu_sampler.Problem, "run", unsteady)
        bad = gpu_sampler.repeatability("small-strict-top", "cpu", "cpu", runs=3, small=True)
        assert gpu_report.failures([bad]) == [
            "small-strict-top, batch 8: cuda: 1 of 3 runs differ from the first",
        ]

    def test_no_ratio_for_what_failed_its_check(self) -> None:
        wrong = Entry("cuda", [1.0], Check(False, "9 codes differ"), facts={"floor_seconds": 0.5})
        naive = Entry("naive", [9.0], Check(True, "the reference"), extrapolated="somehow")
        header, cuda, _ = gpu_report.table([Result("sampling on a GPU", "a", 1, [wrong, naive])])
        assert header.split()[-3:] == ["floor", "time/floor", "check"]
        assert cuda.split() == ["a", "1", "cuda", "1", "s", "1", "-", "500", "ms", "-", "FAILED"]

    @pytest.mark.parametrize("name", [*gpu_sampler.PRIORS, *gpu_sampler.REPEATED])
    def test_cases_exist(self, name: str) -> None:
        case = gpu_sampler.case_of(name, 256)
        assert (case.batch, case.naive_batch, case.checked) == (256, 16, 2)
        assert case.config is not None


def test_tiny_plans_run_on_a_cpu(one_thread: None) -> None:
    count = gpu_tiny.run_engine("cpu", "cpu") if _engine.available() else 24
    assert count == 24
    assert gpu_tiny.run_ops("cpu", None) == 5


class TestCommand:
    def test_cases_of_operations_exist(self) -> None:
        known = {case.id for case in CASES if case.device == "cuda"}
        assert {name.partition("[")[2].removesuffix("]") for name in gpu.OPERATION_CASES} <= known

    def test_all_parts_fit_into_nine_minutes(self) -> None:
        parts = gpu.parts(Path("out"))
        assert [part.name for part in parts] == ["tests", "probes", "sampler", "memcheck", "racecheck", "operations"]
        # The last one takes what the others leave.
        assert sum(part.seconds for part in parts[:-1]) + parts[-1].least <= gpu.LIMIT - 15 <= 525

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--out"),
            (["--out", "x", "--seconds", "541"], "--seconds: expected 30 to 540, got 541"),
            (["--out", "x", "--seconds", "nan"], "--seconds: expected 30 to 540, got nan"),
            (["--out", "x", "--only", "nothing"], "--only"),
            (["--out", __file__], "--out: expected a folder"),
        ],
        ids=["no-folder", "too-long", "nan", "no-such-part", "a-file"],
    )
    def test_wrong_arguments(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            gpu.main(arguments)
        assert raised.value.code == gpu.WRONG_ARGUMENTS
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("code", "status"), [("print('fine')", 0), ("raise SystemExit(1)", 1)], ids=["good", "bad"]
    )
    def test_whole_command(
        self,
        code: str,
        status: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        part = Part("only", lambda _: [sys.executable, "-c", code], 20.0)
        monkeypatch.setattr(gpu, "parts", lambda out: [part])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "write", lambda out, outcomes, limit: (out / gpu.FILE).write_text(repr(outcomes)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sampler.json").write_text("from an earlier run")
        assert gpu.main(["--out", str(tmp_path / "out")]) == status
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "only.log"}
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split()[:2] == ["only", "failed" if status else "passed"]

    def test_report_and_file(self, tmp_path: Path) -> None:
        gpu_probes.save(probes(), tmp_path)
        outcomes = [Outcome("probes", "passed", 3.0, "fine"), Outcome("racecheck", "missing", 0.0, "not run")]
        gpu.write(tmp_path, outcomes, 540.0)
        stored = json.loads((tmp_path / gpu.FILE).read_text())
        assert [part["status"] for part in stored["parts"]] == ["passed", "missing"]
        assert {"date", "machine", "versions", "commit", "dirty"} <= set(stored)
        lines = gpu.report(tmp_path, outcomes)
        assert lines[-2:] == ["probes     passed      3 s  fine", "racecheck  missing     0 s  not run"]
        assert any("800.0 TFLOP/s" in line for line in lines)
