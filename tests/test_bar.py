"""Progress bars: on a terminal as such, in a log file as lines."""

from __future__ import annotations

import io
import sys

import pytest

from fastvq import _bar
from fastvq._bar import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, every: float = _bar._EVERY) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_bar, "_EVERY", every)
    with bar("storing", show=True, total=3) as counter:
        for _ in range(3):
            counter.update()
    return stream.getvalue()


def test_a_log_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), every=0)
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("storing: ") for line in lines)
    assert "3/3 [" in lines[-1]


def test_a_log_file_gets_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.split(" [")[0] for line in shown(monkeypatch, io.StringIO()).splitlines()] == [
        "storing: 0/3",
        "storing: 3/3",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\rstoring: 100%|" in shown(monkeypatch, Terminal())


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar("frames", show=False, items=[1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
