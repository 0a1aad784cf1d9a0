"""The whole check as far as it goes without a GPU: its parts, their time, and what is said about them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.peers  # noqa: F401
from bench.gpu import __main__ as command
from bench.gpu.files import save
from bench.gpu.lines import Line
from bench.gpu.parts import Found, Outcome, Part, by_status, exit_status, judge_sanitizer, judge_tests, run_parts
from bench.machine import ROOT
from bench.registry import every_peer


def code_part(name: str, code: str, **changes: Any) -> Part:
    """A part that runs a line of Python."""
    fields: dict[str, Any] = {"seconds": 20.0, "least": 1.0, **changes}
    return Part(name, lambda _: [sys.executable, "-c", code], **fields)


class TestParts:
    def test_status_seconds_and_log_of_every_part(self, tmp_path: Path) -> None:
        parts = [code_part("good", "print('fine')"), code_part("bad", "print('oh'); raise SystemExit(3)")]
        good, bad = run_parts(parts, tmp_path, 60, print)
        assert (good.status, good.detail) == ("passed", "fine")
        assert (bad.status, bad.detail) == ("failed", "exit status 3: oh")
        assert 0 < good.seconds < 20
        assert (tmp_path / "good.log").read_text() == "fine\n"

    def test_a_part_that_hangs_is_stopped_with_what_it_started(self, tmp_path: Path) -> None:
        beat = tmp_path / "beat"
        child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.05)"
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        start = time.monotonic()
        (outcome,) = run_parts([code_part("hangs", code, seconds=4.0)], tmp_path, 60, print)
        assert outcome.status == "out of time"
        assert time.monotonic() - start < 15
        assert beat.stat().st_size
        size = beat.stat().st_size
        time.sleep(0.3)
        assert beat.stat().st_size == size

    def test_what_the_time_does_not_suffice_for_is_named(self, tmp_path: Path) -> None:
        ticks = iter([0.0, 0.0, 0.0, 95.0, 95.0, 95.0, 95.0])
        parts = [code_part("first", "pass"), code_part("second", "pass", least=10.0)]
        first, second = run_parts(parts, tmp_path, 100, print, clock=lambda: next(ticks))
        assert (first.status, first.seconds) == ("passed", 95.0)
        assert (second.status, second.detail) == ("skipped", "5 s left, it needs 10 s")
        assert not (tmp_path / "second.log").exists()

    def test_a_part_is_told_its_share(self, tmp_path: Path) -> None:
        told: list[float] = []

        def command(seconds: float) -> list[str]:
            told.append(seconds)
            return [sys.executable, "-c", "pass"]

        run_parts([Part("a", command, 50.0), Part("b", command, 500.0)], tmp_path, 120, print)
        assert told[0] == 45.0
        assert 100 < told[1] <= 115

    def test_a_missing_program_is_named(self, tmp_path: Path) -> None:
        (outcome,) = run_parts([code_part("tool", "", missing="not run: no tool")], tmp_path, 60, print)
        assert (outcome.status, outcome.detail) == ("missing", "not run: no tool")

    @pytest.mark.parametrize(
        ("states", "allow_missing", "status"),
        [
            (["passed", "passed"], False, 0),
            (["passed", "missing"], False, 1),
            (["passed", "missing"], True, 0),
            (["passed", "skipped"], True, 1),
            (["out of time"], True, 1),
            (["failed", "passed"], True, 1),
            ([], True, 1),
        ],
    )
    def test_exit_status(self, states: list[Any], allow_missing: bool, status: int) -> None:
        outcomes = [Outcome("part", state, 1.0, "") for state in states]
        assert exit_status(outcomes, allow_missing=allow_missing) == status


JUNIT = {
    "skipped": ('<testcase name="a"><skipped/></testcase>', "failed"),
    "run": ('<testcase name="a"/><testcase name="b"><skipped/></testcase>', "passed"),
    "failure": ('<testcase name="a"/><testcase name="b"><failure/></testcase>', "failed"),
    "error": ('<testcase name="a"/><testcase name="b"><error/></testcase>', "failed"),
    "none": ("", "failed"),
}


class TestVerdicts:
    @pytest.mark.parametrize("name", JUNIT)
    def test_tests_pass_only_if_one_was_run(self, name: str, tmp_path: Path) -> None:
        body, status = JUNIT[name]
        junit = tmp_path / "tests.xml"
        junit.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
        assert judge_tests(junit)(0, "").status == status
        assert judge_tests(junit)(1, "").status == "failed"
        assert judge_tests(tmp_path / "none.xml")(0, "").status == "failed"

    def test_skipped_tests_are_named_where_asked_for(self, tmp_path: Path) -> None:
        junit = tmp_path / "tests.xml"
        junit.write_text(f"<testsuites><testsuite>{JUNIT['run'][0]}</testsuite></testsuites>")
        assert judge_tests(junit, name_skipped=True)(0, "").detail == "1 run, 1 skipped, 0 failed; skipped: b"

    @pytest.mark.parametrize(
        ("status", "log", "verdict"),
        [
            (0, "the end\n========= ERROR SUMMARY: 0 errors\n", "passed"),
            (0, "the end\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
            (0, "the end\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", "failed"),
            (9, "the end\n========= ERROR SUMMARY: 3 errors\n", "failed"),
            (0, "the end\n", "failed"),
            (0, "========= ERROR SUMMARY: 0 errors\n", "failed"),
        ],
        ids=["memcheck", "racecheck", "hazards", "errors", "no-summary", "not-at-its-end"],
    )
    def test_sanitizer(self, status: int, log: str, verdict: str) -> None:
        assert judge_sanitizer("the end")(status, log).status == verdict

    def test_without_output(self) -> None:
        assert by_status(0, "\n") == Found("passed", "no output")


def test_no_test_starts_after_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("import time\ndef test_first(): time.sleep(1.2)\ndef test_late(): raise AssertionError\n")
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "bench.gpu.deadline", "-q"]
    options = ["--start-within", "1", f"--junitxml={junit}", "-c", "/dev/null"]
    done = subprocess.run([*command, *options, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    found = judge_tests(junit, name_skipped=True)(done.returncode, "")
    assert found == Found("passed", "1 run, 1 skipped, 0 failed; skipped: test_late")


class TestCommand:
    def test_cases_of_operations_exist(self) -> None:
        found = every_peer(command.OPERATION_CASES)
        for case in command.OPERATION_CASES:
            assert sum(name.startswith(case.removesuffix("]")) for name in found) > 1

    def test_all_parts_fit_into_nine_minutes(self) -> None:
        parts = command.parts(Path("out"))
        assert [part.name for part in parts] == ["tests", "probes", "sampler", "memcheck", "racecheck", "operations"]
        # The last one takes what the others leave.
        assert sum(part.seconds for part in parts[:-1]) + parts[-1].least <= command.LIMIT - 15 <= 525

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
            command.main(arguments)
        assert raised.value.code == command.WRONG_ARGUMENTS
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
        monkeypatch.setattr(command, "parts", lambda out: [part])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "save", lambda path, found: path.write_text(repr(found)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sampler.json").write_text("from an earlier run")
        assert command.main(["--out", str(tmp_path / "out")]) == status
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "only.log"}
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split()[:2] == ["only", "failed" if status else "passed"]

    def test_report_and_file(self, tmp_path: Path) -> None:
        save(tmp_path / "sampler.json", {"lines": [dataclasses.asdict(Line("a-top", 1, "cuda", [2.0], [1.0]))]})
        outcomes = [Outcome("probes", "passed", 3.0, "fine"), Outcome("racecheck", "missing", 0.0, "not run")]
        said = command.report(tmp_path, outcomes)
        assert said[1].split() == ["a-top", "1", "cuda", "2", "s", "1", "s", "1", "-", "-", "-", "ok"]
        assert said[-2:] == ["probes     passed      3 s  fine", "racecheck  missing     0 s  not run"]
