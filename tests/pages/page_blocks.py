"""The pages of the project, the code blocks on them, which sybil finds and runs in order, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if "_build" not in path.relative_to(ROOT).parts
    ),
)
_FENCES = FencedCodeBlockLexer(language=r"[^\n`]*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: path of the page inside the repository.
        line: number of the line in which the fence opens.
        language: the word behind the fence, or nothing.
        text: what is between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


@dataclass
class Work:
    """A page while it is run.

    Attributes:
        folder: where its blocks run; the current folder.
        patch: what is changed for this page.
        names: of its Python.
        outputs: what each block printed that was run.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """What is known of one block.

    Attributes:
        text: a part of the block that no other block of the page has.
        before: lays out files, and gives names that the block takes for granted.
        gives: names that the block leaves, each with what must hold of it.
        prints: words that it prints.
        warns: a warning that it gives.
        runs: commands of ``fastvq`` that are run, not only parsed, each with words that are added to make it small.
        shows: the block is what the block before prints.
    """

    text: str
    before: Callable[[Work], Mapping[str, Any]] | None = None
    gives: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    prints: tuple[str, ...] = ()
    warns: tuple[type[Warning], str] | None = None
    runs: Mapping[str, str] | None = None
    shows: bool = False


@dataclass(frozen=True)
class Page:
    """What is known of one page.

    Attributes:
        entries: of blocks that need or give something.
        packages: without which it is not run.
        runs: as of `Entry`, for blocks without an entry.
        after: checks what is there when all blocks have been run.
    """

    entries: tuple[Entry, ...] = ()
    packages: tuple[str, ...] = ()
    runs: Mapping[str, str] | None = None
    after: Callable[[Work], None] | None = None

    def entry(self, block: Block) -> Entry:
        return next((entry for entry in self.entries if entry.text in block.text), Entry("", runs=self.runs))


def document(page: str, run: Callable[[Block], None]) -> Document:
    """A page whose examples, one for each block, are run by a function."""

    def evaluate(example: Example) -> None:
        run(example.parsed)

    def parse(found: Document) -> Iterator[Region]:
        for lexed in _FENCES(found):
            line = found.text.count("\n", 0, lexed.start) + 1
            block = Block(page, line, lexed.lexemes["language"].strip(), str(lexed.lexemes["source"]))
            yield Region(lexed.start, lexed.end, block, evaluate)

    return Document.parse(str(ROOT / page), parse)


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    return [example.parsed for example in document(page, lambda block: None).examples()]


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block as it stands; errors name the line of the page."""
    exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec", dont_inherit=True), names)
