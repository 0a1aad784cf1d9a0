"""The parts of the GPU check: their time, what is said about them, and which tests they choose."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_selection
from bench.gpu_parts import Found, Outcome, Part, by_status, exit_status, judge_sanitizer, judge_tests, run_parts
from bench.machine import ROOT


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


class TestSelection:
    def test_only_tests_that_need_a_gpu_are_left(self, tmp_path: Path) -> None:
        text = """
            import pytest, torch
            needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
            def test_on_a_gpu(): pass
            @needs
            def test_other(): pass
            @pytest.mark.skipif(True, reason="no compiler")
            def test_compiler(): pass
            def test_plain(): raise AssertionError
        """
        path = tmp_path / "test_some.py"
        path.write_text("\n".join(line[12:] for line in text.splitlines()))
        (tmp_path / "test_none.py").write_text("def test_plain(): pass\n")
        assert gpu_selection.files(tmp_path) == [path]
        junit = tmp_path / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "bench.gpu_selection", "-q"]
        done = subprocess.run(
            [*command, f"--junitxml={junit}", "-c", "/dev/null", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        count = 2 if torch.cuda.is_available() else 1
        assert judge_tests(junit)(0, "") == Found("passed", f"{count} run, {2 - count} skipped, 0 failed")

    def test_the_repository_has_such_files(self) -> None:
        names = {path.name for path in gpu_selection.files(ROOT / "tests")}
        kernels = {f"test_triton_{name}.py" for name in ("nearest_code", "causal_conv", "causal_attention")}
        assert kernels | {"test_causal_registered.py", "test_cuda_engine.py"} <= names


def test_no_test_starts_after_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("import time\ndef test_first(): time.sleep(1.2)\ndef test_late(): raise AssertionError\n")
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "bench.gpu_deadline", "-q"]
    options = ["--start-within", "1", f"--junitxml={junit}", "-c", "/dev/null"]
    done = subprocess.run([*command, *options, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    found = judge_tests(junit, name_skipped=True)(done.returncode, "")
    assert found == Found("passed", "1 run, 1 skipped, 0 failed; skipped: test_late")
