"""Another checkout of fastvq, built in place, in a process of its own: that of the commit before a change.

``FASTVQ_BEFORE=DIR pytest bench/ --benchmark -k before``. Both take turns in one run, on the same weights.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.clock import Timed
from bench.registry import LeftOutError
from fastvq.models.prior import Prior

VARIABLE = "FASTVQ_BEFORE"


class Before:
    """The process, and what it is asked."""

    def __init__(self, checkout: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fastvq-before-")
        self._saved: tuple[Prior, str] | None = None
        self._count = 0
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, str(Path(__file__).with_name("before_worker.py"))]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._folder.name
        )
        atexit.register(self.close)
        found = Path(self._answer()["fastvq"])
        if not found.is_relative_to(checkout):
            raise RuntimeError(f"{VARIABLE}: expected a process that imports fastvq from {checkout}, got {found}")
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
        self.commit = done.stdout.strip()

    def path_of(self, prior: Prior) -> str:
        """A folder with the prior; that of another is gone then."""
        if self._saved is None or self._saved[0] is not prior:
            if self._saved is not None:
                shutil.rmtree(self._saved[1])
            self._saved = (prior, str(self._file("prior")))
            prior.save_pretrained(self._saved[1])
        return self._saved[1]

    def _file(self, kind: str) -> Path:
        self._count += 1
        return Path(self._folder.name, f"{kind}{self._count}")

    def sample(self, path: str, n: int, arguments: dict[str, Any], threads: int) -> Timed:
        """Codes of all levels, and seconds as the process has measured them."""
        file = self._file("call")
        torch.save(arguments, file)
        question = {"path": path, "n": n, "arguments": str(file), "threads": threads}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        codes: list[Tensor] = torch.load(answer["codes"], weights_only=True)
        for used in (file, Path(answer["codes"])):
            used.unlink()
        return Timed(codes, answer["seconds"], answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{VARIABLE}: the process has ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def _started(checkout: Path) -> Before:
    return Before(checkout)


def before() -> Before:
    """
    Raises:
        LeftOutError: no other checkout is named.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        raise LeftOutError(f"{VARIABLE} names no other checkout")
    return _started(Path(named).resolve())
