"""What pages show of recorded results, refreshed: ``python -m bench.pages [--check]``.

In README.md and docs/*.md what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each on a line of
its own, is replaced by the block of that name (`BLOCKS`, and ``figure-NAME`` for pictures), and the pictures in
docs/figures are drawn anew where their data have changed. `bench.recorded` says which files count for what.
``--check`` changes nothing.

Exit status: 0 all is up to date (now); 1 with ``--check``, something is not, and is named; 2 a marker is unknown,
doubled or without its end, and nothing was changed.
"""

from __future__ import annotations

import argparse
import functools
import posixpath
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import tables
from bench.drawing import Picture, draw, is_current
from bench.figures import FIGURES
from bench.machine import ROOT
from bench.recorded import GPU, NARROW, RESULTS, WIDE, WIDE_BEFORE, Recorded, Run, recorded
from bench.tables import Link
from fastvq._files import replacing_file

# Below the root, as pages are.
FIGURES_FOLDER = Path("docs/figures")
RESULTS_FOLDER = RESULTS.relative_to(ROOT)
Block = Callable[[Recorded, Link], str]
BLOCKS: dict[str, Block] = {
    "measured": tables.claims,
    "runs": tables.sources,
    "little-gained": tables.little_gained,
    "results-avx512": lambda found, link: tables.results(found, WIDE, link),
    "results-avx512-32k": lambda found, link: tables.results(found, WIDE_BEFORE, link),
    "results-avx2": lambda found, link: tables.results(found, NARROW, link),
    "results-h200": lambda found, link: tables.results(found, GPU, link),
}
_MARKER = re.compile(r"^<!-- (?P<kind>begin|end) (?P<name>\S+) -->[ \t]*$", re.MULTILINE)


class MarkerError(ValueError):
    """A page has a marker that cannot be."""


def replaced(text: str, blocks: Mapping[str, Callable[[], str]], page: str) -> tuple[str, list[str]]:
    """A page with what stands between its markers replaced, and the names of the blocks that have changed.

    Args:
        blocks: what makes the text of each name.
        page: its name, for messages.

    Raises:
        MarkerError: a name that is not among ``blocks``, that begins twice, or that has no end.
    """
    pieces, changed, at = [], [], 0
    for name, start, end in _places(text, page, list(blocks)):
        new = f"\n{blocks[name]()}\n"
        if text[start:end] != new:
            changed.append(name)
        pieces += [text[at:start], new]
        at = end
    return "".join([*pieces, text[at:]]), changed


def _places(text: str, page: str, known: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of what stands between each pair of markers, line breaks included."""
    seen: set[str] = set()
    begun: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        name = marker["name"]
        if name not in known:
            raise MarkerError(f"{page}: no block is called {name}; expected one of {', '.join(known)}")
        if marker["kind"] == "begin":
            if begun is not None:
                raise MarkerError(f"{page}: {name} begins before the end of {begun['name']}")
            if name in seen:
                raise MarkerError(f"{page}: {name} is there twice")
            seen.add(name)
            begun = marker
        elif begun is None or begun["name"] != name:
            raise MarkerError(f"{page}: {name} ends without having begun")
        else:
            yield name, begun.end(), marker.start()
            begun = None
    if begun is not None:
        raise MarkerError(f"{page}: {begun['name']} has no end")


def link_from(page: Path) -> Link:
    """Links to recorded files from a page; both paths are relative to the root."""

    def link(run: Run, text: str) -> str:
        return f"[{text}]({_address(RESULTS_FOLDER / run.name, page)})"

    return link


def _address(file: Path, page: Path) -> str:
    """Of a file, as a page names it."""
    return posixpath.relpath(file.as_posix(), page.parent.as_posix())


def pictures(found: Recorded) -> list[Picture]:
    """All of the documentation that there are recorded results for."""
    made = (make(found, machine) for make, machine in FIGURES.values())
    return [picture for picture in made if picture is not None]


def blocks_of(found: Recorded, page: Path, drawn: Sequence[Picture]) -> dict[str, Callable[[], str]]:
    """What makes each block of a page: tables, and pictures with what is said under them, as ``figure-NAME``."""
    link = link_from(page)
    made = {name: functools.partial(block, found, link) for name, block in BLOCKS.items()}
    for picture in drawn:
        address = _address(FIGURES_FOLDER / f"{picture.name}.png", page)
        files = (f"[{n}]({_address(RESULTS_FOLDER / file, page)})" for n, file in enumerate(picture.files, 1))
        shown = f"![{picture.alt}]({address})\n\n*{picture.caption}* Recorded: {', '.join(files)}."
        made[f"figure-{picture.name}"] = functools.partial(str, shown)
    return made


def refresh(root: Path, found: Recorded, *, check: bool = False) -> list[str]:
    """Bring pages and pictures up to date.

    Returns:
        what was out of date.

    Raises:
        MarkerError: as of :func:`replaced`; nothing has been changed.
    """
    drawn = pictures(found)
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    stale, files = [], {}
    for path in pages:
        page = path.relative_to(root)
        text, changed = replaced(path.read_text(encoding="utf-8"), blocks_of(found, page, drawn), page.as_posix())
        if changed:
            stale += [f"{page.as_posix()}: {name}" for name in changed]
            files[path] = text
    old = [picture for picture in drawn if not is_current(picture, root / FIGURES_FOLDER / f"{picture.name}.png")]
    stale += [f"{FIGURES_FOLDER.as_posix()}/{picture.name}.png" for picture in old]
    if not check:
        contents = {root / FIGURES_FOLDER / f"{picture.name}.png": draw(picture) for picture in old}
        (root / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
        for path, data in {**contents, **{path: text.encode() for path, text in files.items()}}.items():
            with replacing_file(path) as temporary:
                temporary.write_bytes(data)
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    check = parser.parse_args(arguments).check
    try:
        stale = refresh(ROOT, recorded(), check=check)
    except MarkerError as error:
        print(error, file=sys.stderr)
        return 2
    for name in stale:
        print(f"{name}: {'out of date' if check else 'refreshed'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
