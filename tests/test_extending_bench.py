"""A peer and a case from outside of bench/ are timed, checked, compared and saved like its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASE = "n300-k20-d6-forward"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent / "toys"), os.environ.get("PYTHONPATH", "")])
    # What a worker of pytest-xdist would otherwise hand on to the process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "peer", "-p", "no:cacheprovider", "bench/test_nearest_code.py"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )


def test_a_peer_from_outside_is_timed_checked_and_compared(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    wanted = f"{CASE} and (fastvq or eager or toy)"
    done = bench("--benchmark", f"--benchmark-json={saved}", "--results", str(tmp_path / "results"), "-k", wanted)
    # The wrong one fails, and it alone.
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 passed" in done.stdout
    assert "wrong toy: " in done.stdout
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("case ") and "over toy" in line)
    rows = lines[start + 2 : start + 6]
    assert [row for row in rows if "CHECK FAILED" in row] == [row for row in rows if "wrong toy" in row] != []
    entries = {one["extra_info"]["peer"]: one for one in json.loads(saved.read_text())["benchmarks"]}
    assert set(entries) == {"fastvq", "eager", "toy"}
    toy = entries["toy"]
    assert toy["group"] == CASE
    assert toy["extra_info"]["check"]["passed"]
    assert set(toy["extra_info"]["speedup_over"]) == {"fastvq", "eager"}
    assert toy["extra_info"]["over_floor"] > 1
    assert toy["stats"]["rounds"] >= 3
    # The same rounds are in the other file.
    (other,) = (tmp_path / "results").glob("*.json")
    (result,) = json.loads(other.read_text())["results"]
    assert next(one for one in result["entries"] if one["peer"] == "toy")["seconds"] == toy["stats"]["data"]
    report = subprocess.run(
        [sys.executable, "-m", "bench.report", str(saved)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "over toy" in report.stdout


@pytest.mark.parametrize(
    ("arguments", "outcome"),
    [
        (["--benchmark-only"], "3 passed"),
        (["--benchmark-skip"], "3 skipped"),
        (["--benchmark", "--benchmark-disable"], "3 passed"),
        (["-n", "2"], "3 passed"),
    ],
    ids=["only", "skip", "disable", "processes"],
)
def test_options_of_pytest_benchmark(arguments: list[str], outcome: str) -> None:
    done = bench(*arguments, "-k", f"{CASE} and (fastvq or eager or toy) and not wrong")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome in done.stdout
    assert ("Name (time in" in done.stdout) == (arguments == ["--benchmark-only"])
