"""What the report may say: no ratio without a passed check, extrapolated times marked, everything in the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.files import benchmark_json, free_path, load, session_of, to_json, write_json
from bench.harness import Check, Entry, Memory, Peer, Recorder, Result, Work, measure, repeats
from bench.machine import ROOT
from bench.made_up import BAD, GOOD
from bench.recorded import recorded_files
from bench.report import legend, tables
from bench.units import number, seconds, size


def _recorder(*entries: Entry) -> Recorder:
    recorder = Recorder(quick=False, log=print)
    recorder.ceilings.gemm["made up"] = [100e9, 50e9]
    recorder.ceilings.read[4 << 20] = [10e9]
    work = [Work("rows", 100e9), Work("steps", 10e9, 5e9, 1000)]
    recorder.results.append(
        Result("sampling", "a case", 8, list(entries), work, [Memory("cpu", 11_000_000, 10_000_000)])
    )
    return recorder


def test_table_holds_ratios_to_every_peer_and_to_the_floor() -> None:
    recorder = _recorder(Entry("naive", [30.0, 10.0, 20.0], GOOD), Entry("cpu", [2.0], GOOD))
    header, _, naive, cpu = tables(recorder.results, recorder.ceilings)[1:5]
    assert "over naive" in header
    assert "over cpu" in header
    assert naive.split()[:6] == ["a", "case", "8", "naive", "20", "s"]
    # The floor is 1 s of arithmetic and 0.5 s of reading.
    assert cpu.split()[:7] == ["cpu", "2", "s", "1", "10", "-", "1.33"]
    assert "11 MB = 1.10 of predicted" in cpu


@pytest.mark.parametrize("check", [BAD, None], ids=["failed", "not-checked"])
def test_no_ratio_without_a_passed_check(check: Check | None) -> None:
    recorder = _recorder(Entry("naive", [20.0], GOOD), Entry("cpu", [2.0], check))
    result = recorder.results[0]
    assert result.speedup(result.entries[1], "naive") is None
    assert result.speedup(result.entries[0], "cpu") is None
    cpu = tables(recorder.results, recorder.ceilings)[4]
    assert cpu.split()[:7] == ["cpu", "2", "s", "1", "-", "-", "-"]
    assert ("CHECK FAILED" in cpu) == (check is BAD)


def test_inexact_entries_are_not_compared() -> None:
    recorder = _recorder(Entry("naive", [20.0], GOOD), Entry("cpu bf16", [1.0], GOOD, exact=False))
    lines = tables(recorder.results, recorder.ceilings)
    assert "over cpu bf16" not in lines[1]
    assert lines[4].split()[:8] == ["cpu", "bf16", "(not", "exact)", "1", "s", "1", "-"]


def test_a_part_of_the_operation_is_neither_faster_nor_slower() -> None:
    part = Entry("gemm only", [0.5], None, whole=False)
    recorder = _recorder(Entry("naive", [20.0], GOOD), Entry("cpu", [2.0], GOOD), part, Entry("bad", [0.1], BAD))
    lines = tables(recorder.results, recorder.ceilings)
    assert "over gemm only" not in lines[1]
    assert "time/floor  time/gemm only" in lines[1]
    # over naive, over cpu, over bad, time/floor, time/gemm only
    assert lines[4].split()[:9] == ["cpu", "2", "s", "1", "10", "-", "-", "1.33", "4"]
    assert lines[5].split()[2:7] == ["(not", "the", "operation)", "500", "ms"]
    assert lines[5].split()[7:13] == ["1", "-", "-", "-", "-", "-"]
    assert lines[6].split()[:9] == ["bad", "100", "ms", "1", "-", "-", "-", "-", "-"]
    result = recorder.results[0]
    assert [result.speedup(part, peer) for peer in ("naive", "cpu")] == [None, None]
    assert [result.speedup(entry, "gemm only") for entry in result.entries] == [None] * 4


def test_even_a_checked_part_is_not_compared() -> None:
    recorder = _recorder(Entry("cpu", [2.0], GOOD), Entry("gemm only", [0.5], GOOD, whole=False))
    assert recorder.results[0].speedup(recorder.results[0].entries[0], "gemm only") is None
    assert "over gemm only" not in tables(recorder.results, recorder.ceilings)[1]


def test_what_was_left_out_says_why_and_keeps_its_place() -> None:
    recorder = _recorder(Entry("cpu", [2.0], GOOD, remarks=["backend cpp"]))
    recorder.results[0].left_out = {"eager": "about 34 GB for N x K, limit 9"}
    lines = tables(recorder.results, recorder.ceilings)
    assert lines[3].endswith("backend cpp; 0 of 9 codes differ")
    assert lines[4].split()[:2] == ["eager", "-"]
    assert lines[4].endswith("left out: about 34 GB for N x K, limit 9")
    # A case in which nobody could run still has its name.
    recorder.results[0].entries = []
    assert tables(recorder.results, recorder.ceilings)[3].startswith("a case      8  eager")


@pytest.mark.parametrize(
    ("spent", "said"), [([1.0, 2.0, 1.5], "rows 1.5 s, steps 2 s"), ([0.5], "rows 500 ms, steps 3 s")]
)
def test_phases_are_those_of_every_run_or_of_one(spent: list[float], said: str) -> None:
    recorder = _recorder(Entry("cpu", [3.0, 4.0, 3.5], GOOD, facts={"row_phase_seconds": spent}))
    assert said in "\n".join(tables(recorder.results, recorder.ceilings))


def test_memory_without_prediction(tmp_path: Path) -> None:
    recorder = _recorder(Entry("cpu", [2.0], GOOD))
    recorder.results[0].memory = [Memory("cpu", 12_000_000)]
    assert "12 MB  0 of 9" in tables(recorder.results, recorder.ceilings)[3]
    path = free_path(tmp_path)
    write_json(recorder, path)
    stored = json.loads(path.read_text())["results"][0]["memory"]
    assert stored == [{"peer": "cpu", "measured": 12_000_000, "predicted": None}]


def test_legend_explains_the_operations_that_ran() -> None:
    recorder = _recorder(Entry("cpu", [2.0], GOOD))
    assert "naive model's logits" in "\n".join(legend(recorder.results, recorder.ceilings))
    assert "2 N K D" not in "\n".join(legend(recorder.results, recorder.ceilings))
    recorder.results[0].operation = "nearest code"
    assert "2 N K D" in "\n".join(legend(recorder.results, recorder.ceilings))


def test_floor_of_a_gpu_uses_its_own_rate() -> None:
    recorder = _recorder(Entry("cpu", [2.0], GOOD))
    recorder.ceilings.gpu["cuda tf32"] = {"made up": [1e12, 2e12]}
    recorder.results[0].work = [Work("product", 1e12, unit="cuda tf32")]
    assert recorder.results[0].floor(recorder.ceilings) == 0.5
    assert recorder.ceilings.to_json()["gpu_flops_per_s"] == {"cuda tf32": {"made up": [1e12, 2e12]}}
    assert "cuda tf32, made up: 2000 GFLOP/s" in recorder.ceilings.lines()


def test_extrapolated_times_are_marked() -> None:
    recorder = _recorder(
        Entry("naive", [40.0], GOOD, extrapolated="extrapolated from row 3"), Entry("cpu", [2.0], GOOD)
    )
    lines = tables(recorder.results, recorder.ceilings)
    assert "extrapolated from row 3" in lines[3]
    assert "40 s     e" in lines[3]
    assert "20 e" in lines[4]


def test_file_holds_everything(tmp_path: Path) -> None:
    recorder = _recorder(Entry("naive", [30.0, 10.0, 20.0], GOOD), Entry("cpu", [2.0], BAD))
    first = free_path(tmp_path / "new")
    for _ in range(2):
        write_json(recorder, first)
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert free_path(tmp_path / "new") != first
    values = json.loads(first.read_text())
    assert {"date", "commit", "dirty", "machine", "versions", "ceilings", "results"} <= set(values)
    assert {"cpu", "cores", "threads", "caches", "memory_bytes", "gpus"} <= set(values["machine"])
    assert {"python", "torch", "numpy", "fastvq", "extension"} <= set(values["versions"])
    naive, cpu = values["results"][0]["entries"]
    assert naive["seconds"] == [30.0, 10.0, 20.0]
    assert values["results"][0]["floor_seconds"] == pytest.approx(1.5)
    assert cpu["speedup_over"] == {}


def test_time_of_a_device_stands_beside_that_of_the_call() -> None:
    recorder = _recorder(Entry("cuda", [3.0, 4.0, 3.5], GOOD, facts={"device_seconds": [2.0, 2.5, 2.25]}))
    assert "on the device 2.25 s" in "\n".join(tables(recorder.results, recorder.ceilings))


def test_preparing_a_run_is_not_timed() -> None:
    order: list[str] = []

    def prepare() -> None:
        order.append("prepare")
        time.sleep(0.05)

    times, _ = measure([Peer("a", lambda: order.append("run"), 1.0, 1, prepare)])
    assert order == ["prepare", "run"] * 3
    assert max(times["a"]) < 0.05


def test_peers_take_turns_and_all_repeats_run() -> None:
    order: list[str] = []
    peers = [Peer("a", lambda: order.append("a"), 1.0, 1), Peer("b", lambda: order.append("b"), 100.0, 1)]
    times, results = measure(peers)
    assert [len(times[name]) for name in "ab"] == [3, 1]
    assert sorted(order) == ["a", "a", "a", "b"]
    assert set(results) == {"a", "b"}
    assert repeats(1e-6) > repeats(1.0) == 3


def test_numbers_are_readable() -> None:
    assert [seconds(value) for value in (12345.6, 1.5, 0.0123, 4.5e-6, 2e-9)] == [
        "12346 s",
        "1.5 s",
        "12.3 ms",
        "4.5 us",
        "2 ns",
    ]
    assert number(1999.6) == "2000"
    assert [size(value) for value in (8.6e9, 12_300_000, 4e3)] == ["8.6 GB", "12.3 MB", "0.004 MB"]


def test_files_of_pytest_benchmark_are_read_like_the_others(tmp_path: Path) -> None:
    guess = Entry("naive", [20.0], GOOD, extrapolated="from a few rows")
    recorder = _recorder(guess, Entry("cpu", [3.0, 2.0, 4.0], GOOD, facts={"threads": 2}, remarks=["fine"]))
    output: dict[str, Any] = {"benchmarks": []}
    for entry in recorder.results[0].entries:
        info = {"operation": "sampling", "case": "a case", "batch": 8, "peer": entry.peer}
        output["benchmarks"].append({"extra_info": info, "stats": {"data": entry.seconds, "median": entry.median}})
    output["benchmarks"].append({"extra_info": {}, "stats": {"median": 1.0}})
    benchmark_json(recorder, output)
    naive, cpu, other = (one["extra_info"] for one in output["benchmarks"])
    assert naive["extrapolated"] == "from a few rows"
    assert cpu["speedup_over"] == {"naive": pytest.approx(20 / 3)}
    assert cpu["over_floor"] == pytest.approx(2)
    assert other == {}
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(output))
    assert load(path).results == session_of(json.loads(json.dumps(to_json(recorder)))).results
    # As --benchmark-save writes them.
    del output["benchmarks"][1]["stats"]["data"]
    path.write_text(json.dumps(output))
    assert load(path).results[0].entries[1].seconds == [3.0]
    kept = {"rounds": 3, "min": 2.0, "q1": 2.5, "q3": 3.5, "max": 4.0}
    output["benchmarks"][1]["stats"] |= kept
    path.write_text(json.dumps(output))
    cpu = load(path).results[0].entries[1]
    assert cpu.facts == {"threads": 2, "statistics": kept}
    assert cpu.rounds == 3


@pytest.mark.parametrize(
    "path",
    recorded_files(ROOT / "bench" / "results"),
    ids=lambda path: path.stem,
)
def test_recorded_results_stay_readable(path: Path) -> None:
    session = load(path)
    lines = tables(session.results, session.ceilings)
    assert sum(len(result.entries) + len(result.left_out) for result in session.results) == sum(
        line != "" for line in lines
    ) - 3 * len({result.operation for result in session.results})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"machine_info": {}, "benchmarks": []}')
    with pytest.raises(ValueError, match="expected results of benchmarks, got a file with machine_info, benchmarks"):
        load(path)


def test_files_of_engines_on_a_gpu_are_read_like_the_others(tmp_path: Path) -> None:
    line = {"case": "a", "batch": 8, "exact": True, "passed": True, "said": "fine", "extrapolated": None, "facts": {}}
    found = [
        {**line, "engine": "cuda", "seconds": [2.0, 3.0, 4.0], "device_seconds": [1.0], "left_out": None},
        {**line, "engine": "cuda bf16", "exact": False, "seconds": [1.0], "device_seconds": [], "left_out": None},
        {**line, "engine": "naive", "seconds": [], "device_seconds": [], "left_out": "out of time"},
        {**line, "batch": 1, "engine": "cuda", "seconds": [1.0], "device_seconds": [], "left_out": None},
    ]
    facts = {"date": "2026-01-02", "machine": {"cpu": "a"}, "versions": {}, "commit": None, "dirty": None}
    path = tmp_path / "sampler.json"
    path.write_text(json.dumps({**facts, "gpu_flops_per_s": {"cuda tf32": {"mm": [1e12]}}, "lines": found}))
    session = load(path)
    first, second = session.results
    assert [(one.operation, one.case, one.batch) for one in (first, second)] == [("sampling", "a", n) for n in (8, 1)]
    assert first.entries[0] == Entry("cuda", [2.0, 3.0, 4.0], Check(True, "fine"), facts={"device_seconds": [1.0]})
    assert not first.entries[1].comparable
    assert first.left_out == {"naive": "out of time"}
    assert second.entries[0].median == 1.0
    # What a processor does at best was not measured there, and is not now.
    assert "floor: the case's work at the best rates of this session." in legend(session.results, session.ceilings)


def test_files_that_are_no_results_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"results": []}')
    assert report.main([str(path)]) == 1
    assert "expected results of benchmarks, got a file with results" in capsys.readouterr().err
