"""The page about adding something shows the toys that tests use; that their code is on it is held by test_blocks.py."""

from __future__ import annotations

import re

from page_blocks import ROOT, blocks

PAGE = "docs/extending.md"


def test_every_toy_is_on_the_page() -> None:
    toys = {f"tests/toys/{path.name}" for path in (ROOT / "tests" / "toys").glob("*.py")}
    shown = {block.text.split()[1] for block in blocks(PAGE) if block.language == "python"}
    assert shown == toys
    assert len(toys) >= 5


def test_files_named_by_the_page_are_there() -> None:
    named = re.findall(r"`((?:fastvq|bench|tests)/[\w/]+\.py)`", (ROOT / PAGE).read_text(encoding="utf-8"))
    assert len(named) > 5
    missing = [
        name
        for name in named
        if not {"NAME", "OPERATION"} & set(re.split(r"[/.]", name)) and not (ROOT / name).is_file()
    ]
    assert missing == []
