"""Results of files as one HTML page: tables that sort, and the pictures that they suffice for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from bench.drawing import draw
from bench.figures import FIGURES
from bench.files import Session
from bench.recorded import Recorded, Run
from bench.report import MISSING, TEXT, by_operation, legend
from fastvq._html import Page


def page(sessions: Mapping[Path, Session]) -> Page:
    """The page, from the sessions by their files."""
    runs = [Run(path.name, session) for path, session in sessions.items()]
    made = Page("Benchmarks of fastvq", "; ".join(dict.fromkeys(run.machine for run in runs)))
    found = Recorded(runs)
    for machine in found.machines:
        drawn = [picture for make, _ in FIGURES.values() if (picture := make(found, machine)) is not None]
        if drawn:
            made.heading(f"Pictures: {machine}")
        for picture in drawn:
            made.picture(draw(picture), picture.alt, picture.caption, width=900)
    for run in runs:
        made.heading(run.name)
        made.text(run.source())
        _tables(made, run.session)
    return made


def _tables(made: Page, session: Session) -> None:
    for operation, every_row in by_operation(session.results, session.ceilings, brief=True).items():
        made.heading(operation.capitalize(), level=3)
        # What no row has is left out.
        told = [column for column in zip(*every_row, strict=True) if set(column[1:]) != {MISSING}]
        header, *rows = zip(*told, strict=True)
        cells = [[_plain(cell) for cell in row] for row in rows]
        for row in cells:
            # Names stay on one line, however wide the table is.
            row[0], row[2] = row[0].replace(" ", "\u00a0"), row[2].replace(" ", "\u00a0")
        made.table(header, cells, [i for i, name in enumerate(header) if name not in (*TEXT, "memory")])
        every = [one.left_out.items() for one in session.results if one.operation == operation]
        for peer, reason in dict.fromkeys(pair for pairs in every for pair in pairs):
            made.text(_plain(f"Left out: {peer}: {reason}."))
    made.code("\n".join(legend(session.results, session.ceilings)))


def _plain(text: str) -> str:
    """For where a page reads Markdown."""
    return re.sub(r"([\\`*\[\]])", r"\\\1", text)
