"""The command that checks and measures everything on a GPU says so and stops where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_helpers import needs_gpu, needs_triton

ROOT = Path(__file__).resolve().parent.parent


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Where there is a GPU it is hidden.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("No GPU is available to PyTorch ")
    assert done.stdout.count("\n") == 1
    assert not done.stderr
    assert not out.exists()


def test_the_marker_chooses_tests_whether_or_not_there_is_a_gpu() -> None:
    files = ["tests/kernels/test_triton_checksum.py", "tests/test_gpu_check.py", "tests/ops/test_causal_registered.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    chosen = [line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line]
    assert set(chosen) == {
        "tests/kernels/test_triton_checksum.py::test_on_a_gpu",
        "tests/test_gpu_check.py::test_tiny_plans_on_a_gpu",
        "tests/ops/test_causal_registered.py::test_all_backends_agree_on_a_gpu",
        "tests/ops/test_causal_registered.py::test_attention_of_the_library_agrees_on_a_gpu",
        "tests/ops/test_causal_registered.py::test_gated_block_takes_one_step_on_a_gpu",
    }


@needs_gpu
@needs_triton
@pytest.mark.parametrize("what", ["engine", "ops"])
def test_tiny_plans_on_a_gpu(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.tiny", "--what", what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tiny: all of it has run\n")
