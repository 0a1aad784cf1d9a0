"""Operations of the whole check, kernels compiled ahead and the summary, with small twins on a CPU as stand-ins."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import registry
from bench.cases import case_of
from bench.clock import device_seconds
from bench.files import load
from bench.gpu import ahead, operations, sampler, summary
from bench.gpu.lines import Line
from bench.harness import Check, Entry, Result
from bench.machine import Ceilings
from bench.registry import PEERS, Contender, peers_of

CASES = ("n4096-k512-d64-forward", "residual-n12288-k1024-d128-q8-training")
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the second case, by name: to be changed."""
    changed = dict(PEERS["residual quantiser"])
    changed.pop("vector-quantize-pytorch")
    monkeypatch.setitem(registry.PEERS, "residual quantiser", changed)
    return changed


def broken(kind: type[BaseException]) -> Any:
    def make(problem: registry.Problem) -> Contender:
        raise kind("as was to be expected")

    return make


class TestOperations:
    @pytest.mark.parametrize("case_id", operations.CASES)
    def test_cases_exist_and_have_rivals(self, case_id: str) -> None:
        case = case_of(case_id)
        assert case.device == "cuda"
        assert peers_of(case)[0] == "fastvq"
        assert len(peers_of(case)) > 1

    def test_the_file_is_written_after_every_peer(
        self, peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts: list[int] = []
        write = operations.write_json

        def noting(*arguments: Any) -> None:
            write(*arguments)
            results = json.loads((tmp_path / operations.FILE).read_text())["results"]
            counts.append(sum(len(one["entries"]) for one in results))

        monkeypatch.setattr(operations, "write_json", noting)
        assert operations.run(tmp_path, 300, CASES[1:], small=True) == 0
        assert counts == [1, 2]
        (result,) = load(tmp_path / operations.FILE).results
        assert [entry.peer for entry in result.entries] == ["fastvq", "levels in turn"]
        assert all(entry.check is not None and entry.check.passed for entry in result.entries)

    def test_what_fails_is_named_and_the_rest_goes_on(
        self, peers: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        in_turn = peers.pop("levels in turn")
        peers["bad"] = registry.Registered("bad", broken(RuntimeError))
        peers["lacking"] = registry.Registered("lacking", broken(ImportError))
        peers["levels in turn"] = in_turn
        assert operations.run(tmp_path, 300, CASES[1:], small=True) == 1
        (result,) = load(tmp_path / operations.FILE).results
        assert [entry.peer for entry in result.entries] == ["fastvq", "levels in turn"]
        assert set(result.left_out) == {"bad", "lacking"}
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last == f"{CASES[1]}: bad: failed: RuntimeError: as was to be expected"

    def test_a_wrong_result_is_a_failure(
        self, peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kind = registry.PROBLEMS["residual quantiser"]
        monkeypatch.setattr(kind, "check", lambda *_: Check(False, "7 codes differ"))
        assert operations.run(tmp_path, 300, CASES[1:], small=True) == 1

    def test_a_peer_that_takes_too_long_is_left(
        self, peers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(problem: registry.Problem) -> Contender:
            time.sleep(60)
            raise AssertionError

        peers["slow"] = registry.Registered("slow", slow)
        monkeypatch.setattr(operations, "CASE_SECONDS", 5.0)
        start = time.monotonic()
        assert operations.run(tmp_path, 300, CASES[1:], small=True) == 0
        assert time.monotonic() - start < 40
        (result,) = load(tmp_path / operations.FILE).results
        assert result.left_out["slow"] == "out of time"

    @pytest.mark.parametrize("slow", [True, False], ids=["too-long", "failing"])
    def test_a_case_that_cannot_be_made(
        self, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def make(*_: Any, **__: Any) -> None:
            if slow:
                time.sleep(30)
            raise RuntimeError("no memory")

        monkeypatch.setattr(operations, "Group", make)
        monkeypatch.setattr(operations, "CASE_SECONDS", 1.0)
        assert operations.run(tmp_path, 300, CASES[1:], small=True) == 1
        said = "out of time" if slow else "failed: RuntimeError: no memory"
        assert f"{CASES[1]}: {said}" in capsys.readouterr().out.splitlines()

    def test_cases_beyond_the_time_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert operations.run(tmp_path, 0, CASES, small=True) == 1
        said = capsys.readouterr().out.strip().splitlines()
        assert [f"{case}: out of time" for case in CASES] == [line for line in said if line.startswith(CASES)]


class TestAhead:
    def test_every_task_is_done_by_one_process(self) -> None:
        every = ahead.tasks()
        shared = [task for index in range(7) for task in ahead.share(index, 7)]
        assert Counter(shared) == Counter(every)
        assert max(Counter(every).values()) == 1
        assert max(len(ahead.share(index, 7)) for index in range(7)) - len(every) // 7 <= 1

    def test_engines_come_first_and_all_of_it_is_timed_later(self) -> None:
        engines = [task.kind == "sampler" and task.name in ("cuda", "cuda bf16") for task in ahead.tasks()]
        assert engines == sorted(engines, reverse=True)
        assert sum(engines) == 16
        asked = {(job.prior, job.batch, engine) for job in sampler.JOBS for engine in job.engines}
        for task in ahead.tasks():
            if task.kind == "sampler":
                assert (task.case, task.batch, task.name) in asked
            else:
                assert task.case in operations.CASES
                assert task.name in peers_of(case_of(task.case))

    def test_what_fails_stops_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        done = []

        def do(task: ahead.Task) -> None:
            if task.name == "cuda":
                raise RuntimeError("no such kernel\nand more")
            done.append(task)

        some = [ahead.Task("sampler", "a", 1, name) for name in ("cuda", "naive")]
        ahead.run(some, do)
        assert done == some[1:]
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("sampler a 1 cuda: RuntimeError: no such kernel after ")
        assert second.startswith("sampler a 1 naive: done after ")

    def test_processes_share_a_module_and_are_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = f"""import pathlib, sys, time
        pathlib.Path({str(tmp_path)!r}, "_".join(sys.argv[1:])).touch()
        time.sleep(60 if sys.argv[2] == "0" else 0)
        """.replace("\n        ", "\n")
        (tmp_path / "toy_shares.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)
        start = time.monotonic()
        assert ahead.in_processes("toy_shares", 9, 5.0) == [-9, 0]
        assert time.monotonic() - start < 30
        assert {path.name for path in tmp_path.glob("--share*")} == {"--share_0_2", "--share_1_2"}


def test_seconds_of_a_cpu_are_those_of_the_call() -> None:
    assert 0.02 <= device_seconds(lambda: time.sleep(0.02), torch.device("cpu")) < 2


class TestSummary:
    def test_rows(self) -> None:
        good = Check(True, "fine")
        lines = [
            Line("a", 1, "cuda", [4.0], [3.0], floor=0.5),
            Line("a", 1, "cuda graph", [2.0], [1.5], floor=0.5),
            Line("a", 1, "cuda bf16", [1.0], [0.5], exact=False, floor=0.25),
            Line("a", 1, "torch", [8.0], [8.0], extrapolated="somehow"),
            Line("a", 1, "naive", [80.0], [80.0], extrapolated="somehow"),
            Line("b", 1, "cuda", [9.0], [9.0], passed=False),
            Line("c", 1, "cuda", left_out="out of time"),
        ]
        entries = [
            Entry("fastvq", [2e-3], good, facts={"device_seconds": [1e-3]}),
            Entry("torch", [1e-6], good),
            Entry("eager", [1e-3], good),
            Entry("cdist", [4e-3], good),
            Entry("wrong", [1e-6], Check(False, "no")),
        ]
        wrong = Result("nearest code", "K 3", 2, [Entry("fastvq", [1.0], Check(False, "no"))])
        result = Result("nearest code", "K 2", 2, entries, floor_seconds=1e-4)
        said = summary.table(lines, [result, wrong], Ceilings())
        assert said[2:5] == [
            "| a, batch 1, float32 (cuda graph) | 2 s | 1.5 s | torch 8 s e | 4 e | 4 |",
            "| a, batch 1, bfloat16 (cuda bf16) | 1 s | 500 ms | - | - | 4 |",
            "| nearest code: K 2, 2 | 2 ms | 1 ms | eager 1 ms | 0.5 | 20 |",
        ]
        assert said[5] == ""

    def test_of_nothing_there_is_no_table(self) -> None:
        assert summary.table([], [], Ceilings()) == []
