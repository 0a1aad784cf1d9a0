"""Pages of Markdown, from the same calls that :class:`fastvq._html.Page` makes HTML of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastvq._files import write_text


class MarkdownPage:
    """A page of Markdown that also reads as text.

    Args:
        title: heading of the page; without one it begins with its first block.
    """

    def __init__(self, title: str = "") -> None:
        self._blocks = [f"# {title}"] if title else []

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section."""
        self._blocks.append(f"{'#' * level} {text}")

    def text(self, markdown: str) -> None:
        """Paragraphs, between empty lines."""
        self._blocks.append(markdown)

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> None:
        """A table, padded; ``numbers`` changes nothing here."""
        cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        rule = "|".join("-" * (width + 2) for width in widths)
        self._blocks.append("\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]))

    def picture(self, data: Path, alt: str, caption: str = "") -> None:
        """A picture in the folder that the page will lie in."""
        self._blocks.append(f"![{alt}]({data.name})")
        if caption:
            self._blocks.append(f"*{caption}*")

    def markdown(self) -> str:
        """The whole page."""
        return "\n\n".join(self._blocks) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not; what was there is replaced. Returns the path.

        Raises:
            DiskFullError: there is no room; the file is as it was.
        """
        write_text(Path(path), self.markdown())
        return Path(path)
