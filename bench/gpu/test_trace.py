"""What is made of a trace: the table, Chrome's events, and what happens where there is nothing to trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bench.gpu import trace
from bench.gpu.trace import Trace, chrome_events, save, table

AFFINE = {"code": "affine", "op": 3, "depth": 512, "columns": 16, "steps": 4, "loads": 1, "waits": 2, "jobs": 0}
CHAIN = {"code": "chain", "op": 5, "depth": 0, "columns": 0, "steps": 2, "loads": 2, "waits": 0, "jobs": 0}
DRAW = {"code": "draw", "op": 9, "depth": 0, "columns": 0, "steps": 0, "loads": 0, "waits": 1, "jobs": 3}


def two_blocks() -> Trace:
    """Two clocks a nanosecond. Block 0 has a product that waits 1 us, works 2 and signals 0.5, then a chain that works
    4 and does not signal; block 1 a draw that waits 6 and works 1."""
    times = np.zeros((2, 3, 2, 5), dtype=np.int64)
    for column in range(3):
        begun = 1_000_000 + column * 20_000
        times[0, column, 0] = (begun, begun + 2000, begun + 6000, begun + 7000, 500 + column * 10_000)
        times[0, column, 1] = (begun + 7000, begun + 7000, begun + 15_000, 0, 500 + column * 10_000 + 3500)
        begun = 77 + column * 20_000  # every block has a clock of its own
        times[1, column, 0] = (begun, begun + 12_000, begun + 14_000, begun + 14_000, 1500 + column * 10_000)
    return Trace([[AFFINE, CHAIN], [DRAW]], times)


def test_rate_and_parts() -> None:
    made = two_blocks()
    assert made.clocks_per_microsecond == pytest.approx(2000)
    np.testing.assert_allclose(made.microseconds()[0, 1], [[1.0, 2.0, 0.5], [0.0, 4.0, 0.0]])
    np.testing.assert_allclose(made.microseconds()[1, 2, 0], [6.0, 1.0, 0.0])
    assert made.busiest() == 0


def test_table() -> None:
    lines = table(two_blocks())
    assert lines[0] == "2 blocks, 10.00 us a column; the busiest block is 0:"
    rows = [line.split() for line in lines]
    assert ["0", "affine", "512", "deep,", "16", "columns,", "4", "steps", "2", "1.00", "2.00", "0.50"] in rows
    assert ["1", "chain,", "2", "steps", "0", "0.00", "4.00", "0.00"] in rows
    assert ["draw", "1", "6.00", "1.00", "0.00"] in rows


def test_chrome_events() -> None:
    events = chrome_events(two_blocks())
    first = [event for event in events if event["tid"] == 0 and event["args"]["column"] == 0]
    assert [(event["name"], event["ts"], event["dur"]) for event in first] == [
        ("wait", 0.0, 1.0),
        ("affine 512 deep, 16 columns, 4 steps", 1.0, 2.0),
        ("signal", 3.0, 0.5),
        ("chain, 2 steps", 3.5, 4.0),
    ]
    draw = next(event for event in events if event["tid"] == 1)
    assert (draw["name"], draw["ts"], draw["dur"]) == ("wait", 1.0, 6.0)  # it began 1 us later, by the device's timer
    assert len(events) == 3 * (4 + 2)


def test_files(tmp_path: Path) -> None:
    made = two_blocks()
    assert (tmp_path / "out" / "trace.txt").exists() is False
    lines = save(made, tmp_path / "out")
    assert (tmp_path / "out" / "trace.txt").read_text().splitlines() == lines == table(made)
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"] == chrome_events(made)


def test_without_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fastvq._trace", None)
    with pytest.raises(SystemExit, match="fastvq._trace cannot be imported.*FASTVQ_TRACE=ON"):
        trace.main(["--out", str(tmp_path)])


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fastvq._trace", ModuleType("fastvq._trace"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        trace.main(["--out", str(tmp_path)])
