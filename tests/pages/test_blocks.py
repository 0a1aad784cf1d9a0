"""Every code block of the README and the pages is run or checked, or named with the reason why not."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest
from accelerate_cases import package
from page_blocks import PAGES, ROOT, Block, Entry, Page, Work, blocks, document, run_python
from page_shell import check, check_pytest_options, commands
from page_table import BLOCKS_NOT_RUN, COMMANDS_NOT_CHECKED, KNOWN

from fastvq.cli import main

pytestmark = pytest.mark.usefixtures("steady")

SHELL = ("bash", "console", "sh")
# Code of a file of the repository, which other tests run.
SHOWN_FILE = re.compile(r"# (\S+/\S+\.py)\n")
WITH_BLOCKS = [page for page in PAGES if blocks(page)]


class Runner:
    """Runs or checks the blocks of a page, each by its language and its entry in the table."""

    def __init__(self, page: str, known: Page, work: Work, capsys: pytest.CaptureFixture[str]) -> None:
        self.known, self.work, self.capsys = known, work, capsys
        self.not_run, self.not_checked = BLOCKS_NOT_RUN.get(page, {}), COMMANDS_NOT_CHECKED.get(page, {})

    def __call__(self, block: Block) -> None:
        if any(text in block.text for text in self.not_run):
            return
        entry = self.known.entry(block)
        if entry.shows:
            assert self.work.outputs[-1] == block.text, block
            return
        if entry.before is not None:
            self.work.names.update(entry.before(self.work))
        self.capsys.readouterr()
        warning = (
            contextlib.nullcontext() if entry.warns is None else pytest.warns(entry.warns[0], match=entry.warns[1])
        )
        with warning:
            self.run(block, entry)
        self.work.outputs.append(self.capsys.readouterr().out)
        for name, holds in entry.gives.items():
            assert holds(self.work.names[name]), f"{block}: {name}"
        assert [words for words in entry.prints if words not in self.work.outputs[-1]] == [], block

    def run(self, block: Block, entry: Entry) -> None:
        if block.language == "python":
            if shown := SHOWN_FILE.match(block.text):
                assert block.text[shown.end() :].strip() in (ROOT / shown[1]).read_text(encoding="utf-8"), block
            else:
                run_python(block, self.work.names)
        elif block.language in SHELL:
            for words in commands(block.text):
                if not any(text in shlex.join(words) for text in self.not_checked):
                    self.command(words, entry, block)
        elif block.text.startswith("$ "):
            self.session(block, entry)
        else:
            pytest.fail(
                f"{block}: nothing says how to run a block of {block.language or 'no language'}; see page_table.py"
            )

    def command(self, words: list[str], entry: Entry, block: Block) -> None:
        try:
            check(words)
        except AssertionError as error:
            error.add_note(str(block))
            raise
        if words[0] == "fastvq" and entry.runs is not None:
            added = shlex.split(entry.runs.get(words[1], ""))
            assert main([*words[1:], *added]) == 0, f"{block}: {shlex.join(words)}\n{self.capsys.readouterr().err}"

    def session(self, block: Block, entry: Entry) -> None:
        """A command behind a prompt, and a part of what it prints."""
        line, printed = block.text.removeprefix("$ ").split("\n", 1)
        assert entry.runs is not None, f"{block}: what it shows is not compared; see page_table.py"
        self.command(shlex.split(line), entry, block)
        assert printed in self.capsys.readouterr().out, block


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = KNOWN.get(page, Page())
    for name in known.packages:
        package(name)
    monkeypatch.chdir(tmp_path)
    work = Work(tmp_path, monkeypatch)
    for example in document(page, Runner(page, known, work, capsys)).examples():
        example.evaluate()
    if known.after is not None:
        known.after(work)


def shell_commands(page: str) -> list[list[str]]:
    """Commands of a page, in blocks that are not left out."""
    left_out = BLOCKS_NOT_RUN.get(page, {})
    found = [block for block in blocks(page) if block.language in SHELL]
    return [
        words for block in found if not any(text in block.text for text in left_out) for words in commands(block.text)
    ]


def test_pytest_takes_the_options_that_pages_give_it() -> None:
    given = [words for page in WITH_BLOCKS for words in shell_commands(page)]
    found = [words[words.index("pytest") + 1 :] for words in given if "pytest" in words[:3]]
    assert found != []
    check_pytest_options(found)


@pytest.mark.parametrize("page", sorted({*KNOWN, *BLOCKS_NOT_RUN, *COMMANDS_NOT_CHECKED}))
def test_the_table_names_what_is_there(page: str) -> None:
    """Each entry means one block; none is left over from a block that has gone."""
    entries = [*(entry.text for entry in KNOWN.get(page, Page()).entries), *BLOCKS_NOT_RUN.get(page, {})]
    meant = {text: [str(block) for block in blocks(page) if text in block.text] for text in entries}
    assert {text: found for text, found in meant.items() if len(found) != 1} == {}
    lines = [shlex.join(words) for words in shell_commands(page)]
    unused = [text for text in COMMANDS_NOT_CHECKED.get(page, {}) if not any(text in line for line in lines)]
    assert unused == []


def test_every_page_is_looked_at() -> None:
    assert len(WITH_BLOCKS) > 10
    assert {*KNOWN, *BLOCKS_NOT_RUN, *COMMANDS_NOT_CHECKED} <= {*WITH_BLOCKS}
    assert sum(len(blocks(page)) for page in WITH_BLOCKS) > 50
