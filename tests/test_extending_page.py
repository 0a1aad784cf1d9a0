"""The page about adding something shows the toys that tests use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SHOWN = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("name", "code"), SHOWN, ids=[name for name, _ in SHOWN])
def test_code_of_the_page_is_that_of_the_toy(name: str, code: str) -> None:
    assert code.strip() in (ROOT / name).read_text()


def test_every_toy_is_on_the_page() -> None:
    toys = {f"tests/toys/{path.name}" for path in (ROOT / "tests" / "toys").glob("*.py")}
    assert {name for name, _ in SHOWN} == toys
    assert len(toys) >= 5


def test_files_named_by_the_page_are_there() -> None:
    named = re.findall(r"`((?:fastvq|bench|tests)/[\w/]+\.py)`", PAGE)
    assert len(named) > 5
    missing = [
        name
        for name in named
        if not {"NAME", "OPERATION"} & set(re.split(r"[/.]", name)) and not (ROOT / name).is_file()
    ]
    assert missing == []
