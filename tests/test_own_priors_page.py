"""The Python of docs/own-priors.md, run as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own-priors.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("steady")
def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in BLOCKS:
        exec(compile(code, "own-priors.md", "exec"), names)
    assert len(BLOCKS) == 6
    printed = capsys.readouterr().out
    for shown in re.findall(r"print\(\w+\)  # (.*)", "".join(BLOCKS)):
        for words in shown.split(" ..."):
            assert words.strip(" ;:,") in printed
