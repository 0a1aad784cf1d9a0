"""The whole check as far as it goes without a GPU: its parts, their time, and what is said about them."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu.files import save
from bench.gpu.limit import OutOfTimeError, at_most
from bench.gpu.lines import Line
from bench.gpu.parts import (
    GRACE_SECONDS,
    Found,
    Outcome,
    Part,
    by_status,
    exit_status,
    judge_sanitizer,
    judge_tests,
    run_parts,
)


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

    def test_what_has_become_of_parts_is_told_after_each(self, tmp_path: Path) -> None:
        told: list[list[str]] = []
        parts = [code_part("first", "pass"), code_part("second", "raise SystemExit(1)", optional=True)]
        outcomes = run_parts(parts, tmp_path, 60, print, done=lambda found: told.append([one.status for one in found]))
        assert told == [["passed"], ["passed", "failed"]]
        assert exit_status(outcomes, allow_missing=False) == 0

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


class TestLimit:
    def test_a_block_is_left_when_its_time_is_up(self) -> None:
        start = time.monotonic()

        def tolerant() -> None:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.05)

        with pytest.raises(OutOfTimeError), at_most(0.2):
            tolerant()
        assert 0.15 < time.monotonic() - start < 5

    def test_it_is_over_with_the_block(self) -> None:
        before = signal.getsignal(signal.SIGALRM)
        with at_most(0.2):
            pass
        time.sleep(0.4)
        assert signal.getsignal(signal.SIGALRM) is before


class TestCommand:
    @pytest.mark.parametrize(
        ("short", "limit", "names"),
        [
            (False, 540, ["ahead", "probes", "sampler", "operations", "tests", "memcheck", "racecheck"]),
            (True, 240, ["ahead", "probes", "sampler", "operations", "memcheck"]),
        ],
        ids=["nine-minutes", "four-minutes"],
    )
    def test_all_parts_fit(self, short: bool, limit: int, names: list[str]) -> None:
        parts = command.parts(Path("out"), short=short)
        assert [part.name for part in parts] == names
        assert (command.SHORT_LIMIT if short else command.LIMIT) == limit
        # What is left is for the report and for stopping the last part.
        assert sum(part.seconds for part in parts) <= limit - 15
        assert all(part.least <= part.seconds for part in parts)
        assert [part.name for part in parts if part.optional] == ["ahead"]

    def test_parts_that_begin_case_by_case_are_told_when_to_stop(self) -> None:
        for part in command.parts(Path("out")):
            told = list(part.command(part.seconds - GRACE_SECONDS))
            if part.name in ("sampler", "operations"):
                # The last case that it begins has some seconds.
                assert told[told.index("--seconds") + 1] == f"{part.seconds - GRACE_SECONDS - 12:.0f}"
                assert part.least - GRACE_SECONDS - 12 > 0
            elif part.name != "ahead":
                assert "--seconds" not in told

    @pytest.mark.parametrize(("arguments", "seconds"), [([], 540), (["--short"], 240), (["--seconds", "99"], 99)])
    def test_seconds(self, arguments: list[str], seconds: float, tmp_path: Path) -> None:
        assert command.parse(["--out", str(tmp_path), *arguments]).seconds == seconds

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--out"),
            (["--out", "x", "--seconds", "541"], "--seconds: expected 30 to 540, got 541"),
            (["--out", "x", "--seconds", "nan"], "--seconds: expected 30 to 540, got nan"),
            (["--out", "x", "--only", "nothing"], "--only"),
            (["--out", "x", "--short", "--only", "tests"], "--only: tests are no part of a short run"),
            (["--out", __file__], "--out: expected a folder"),
        ],
        ids=["no-folder", "too-long", "nan", "no-such-part", "not-in-short", "a-file"],
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
        monkeypatch.setattr(command, "parts", lambda out, *, short=False: [part])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "save", lambda path, found: path.write_text(repr(found)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sampler.json").write_text("from an earlier run")
        assert command.main(["--out", str(tmp_path / "out")]) == status
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "only.log", "summary.md"}
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.split()[:2] == ["only", "failed" if status else "passed"]

    def test_report_and_file(self, tmp_path: Path) -> None:
        save(tmp_path / "sampler.json", {"lines": [dataclasses.asdict(Line("a-top", 1, "cuda", [2.0], [1.0]))]})
        outcomes = [Outcome("probes", "passed", 3.0, "fine"), Outcome("racecheck", "missing", 0.0, "not run")]
        said = command.report(tmp_path, outcomes)
        assert said[1].split() == ["a-top", "1", "cuda", "2", "s", "1", "s", "1", "-", "-", "-", "ok"]
        assert "| a-top, batch 1, float32 (cuda) | 2 s | 1 s | - | - | - |" in said
        assert said[-2:] == ["probes     passed      3 s  fine", "racecheck  missing     0 s  not run"]
