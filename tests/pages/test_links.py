"""Links and pictures of the pages lead somewhere, and the site has every page once."""

from __future__ import annotations

import itertools
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
from page_blocks import PAGES, ROOT

LINKED = [*PAGES, "CHANGELOG.md", "LICENSE-DATA.md", "bench/results/gpu/README.md"]
REFERENCE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "api").glob("*.rst"))


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(page: Path) -> set[str]:
    """What a heading can be linked to by, as code hosts and the site make it of its words."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.add(name if not seen[name] else f"{name}-{seen[name]}")
        seen[name] += 1
    return found


def links(page: Path) -> list[str]:
    text = prose(page)
    return re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\"", text)


@pytest.mark.parametrize("page", LINKED)
def test_links_and_pictures_lead_to_files_and_headings(page: str) -> None:
    wrong = []
    for link in links(ROOT / page):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or not target.resolve().is_relative_to(ROOT):
            wrong.append(f"{link}: nothing there in the repository")
        elif target.suffix == ".md" and target.resolve().relative_to(ROOT).as_posix() not in LINKED:
            wrong.append(f"{link}: no page of the site")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert wrong == []


def test_links_are_found() -> None:
    """What the test above looks at is there to be looked at."""
    assert sum(len(links(ROOT / page)) for page in LINKED) > 40
    assert "not-there" in anchors(ROOT / "docs" / "migrating-from-vector-quantize-pytorch.md")


def test_every_page_is_in_the_site_once() -> None:
    parts = runpy.run_path(str(ROOT / "docs" / "conf.py"))["parts"]()
    named = Counter(path for _, path in itertools.chain.from_iterable(parts.values()))
    # The list itself is no part of the list.
    assert named == Counter({*LINKED, *REFERENCE} - {"docs/index.md"})
    assert [*parts] == ["Start", "Ideas", "How-to", "Reference", "Project"]


def test_the_site_is_made_of_the_pages_of_the_test() -> None:
    patterns = runpy.run_path(str(ROOT / "docs" / "conf.py"))["include_patterns"]
    outside = {page for page in LINKED if not page.startswith("docs/")}
    assert {pattern for pattern in patterns if pattern != "docs/**"} == outside
