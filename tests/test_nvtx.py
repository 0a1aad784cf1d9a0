"""Named ranges for profilers: what is inside what, and that they are off unless asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from cuda_stand_in import Job
from engine_helpers import (
    needs_extension,
    spread,
)
from helpers import refuses, snail

from fastvq import _nvtx
from fastvq.errors import UnavailableError

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ranges that a stand-in for the package opens and closes."""
    seen: list[str] = []

    class Annotate:
        def __init__(self, message: str, *, domain: str) -> None:
            assert domain == "fastvq"
            self.message = message

        def __enter__(self) -> None:
            seen.append(f"+{self.message}")

        def __exit__(self, *_: object) -> None:
            seen.append(f"-{self.message}")

    package = types.ModuleType("nvtx")
    package.annotate = Annotate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    monkeypatch.setattr(_nvtx, "_annotate", None)
    monkeypatch.setattr(_nvtx, "_wanted", False)
    return seen


@needs_extension
def test_ranges(ranges: list[str]) -> None:
    wanted = Job(spread(snail(shape=(2, 3)))).run()
    assert ranges == []
    _nvtx.switch(True)
    assert torch.equal(Job(spread(snail(shape=(2, 3)))).run(), wanted)
    row = ["+row", "+row phase", "-row phase", "+step phase", "-step phase", "-row"]
    assert ranges == ["+grid", *row, *row, "-grid"]
    _nvtx.switch(False)
    ranges.clear()
    Job(spread(snail(shape=(2, 3)))).run()
    assert ranges == []


def test_ranges_that_are_off_are_one_object() -> None:
    assert _nvtx.span("a") is _nvtx.span("b")


def test_ranges_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(_nvtx, "_annotate", None)
    monkeypatch.setattr(_nvtx, "_wanted", False)
    with refuses(UnavailableError, "nvtx: ranges were asked for but the package is not installed"):
        _nvtx.switch(True)
    with _nvtx.span("still off"):
        pass


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False), (None, False)])
def test_ranges_by_the_environment(value: str | None, wanted: bool) -> None:
    code = (
        "import sys, types; package = types.ModuleType('nvtx'); sys.modules['nvtx'] = package\n"
        "package.annotate = lambda name, domain: ('range', name)\n"
        "from fastvq import _nvtx\n"
        "print(_nvtx.span('x') == ('range', 'x'))"
    )
    rest = {name: text for name, text in os.environ.items() if name != "FASTVQ_NVTX"}
    environment = rest if value is None else {**rest, "FASTVQ_NVTX": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wanted)
