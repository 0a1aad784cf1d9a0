"""Results as one page of HTML."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from bench.files import Session
from bench.harness import Memory
from bench.made_up import BAD, entry, result, session


def test_pictures_tables_and_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = entry("torch", 1.0, check=BAD)
    one = result(entry("naive", 20.0), wrong, entry("cpu", 2.0), case="small-strict-top", floor_seconds=1.5)
    one.memory, one.left_out = [Memory("cpu", 12_000_000, 10_000_000)], {"before": "no *checkout*"}
    made = session(one)
    made.ceilings.gemm["made up"] = [100e9]

    def load(path: Path) -> Session:
        assert path.name == "a.json"
        return made

    monkeypatch.setattr(report, "load", load)
    html = tmp_path / "page.html"
    assert report.main([str(tmp_path / "a.json"), "--html", str(html)]) == 0
    assert capsys.readouterr().out == f"written to {html}\n"
    text = html.read_text()
    # 2 s over 20 s.
    assert ">10</td>" in text
    assert "<td>passed</td>" in text
    assert "<td>FAILED: 3 of 9 codes differ</td>" in text
    assert "<td>12 MB = 1.20 of predicted</td>" in text
    assert "<p>Left out: before: no *checkout*.</p>" in text
    # Speed, grid, memory and floor.
    assert text.count('src="data:image/png;base64,') == 4
    assert "AMD EPYC with AVX-512, 48K of L1, 2 cores; PyTorch 2.13.0+cpu" in text
