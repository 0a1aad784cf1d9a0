"""A few kills of real commands at random moments; ``python tests/kill_runs.py`` makes more of them, in all commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_killed_commands_go_on_to_the_same_result() -> None:
    command = [sys.executable, "tests/kill_runs.py", "--kills", "4", "--seed", "3"]
    done = subprocess.run(
        [*command, "--commands", "train-vqvae", "extract", "train-prior"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL" in done.stdout
