"""Pages of HTML in one file: text, tables that sort, pictures inside; no network, and readable without scripts."""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastvq._check import require_positive_int
from fastvq._files import write_text
from fastvq.errors import ArgumentError, MissingFileError

# What text() knows of Markdown.
_MARKUP = re.compile(
    r"\\(?P<literal>[!-/:-@\[-`{-~])"
    r"|`(?P<code>[^`]+)`"
    r"|\[(?P<link>[^\[\]]+)\]\((?P<address>(?:[^()\s]|\([^()\s]*\))+)\)"
    r"|\*\*(?P<bold>(?=\S).+?(?<=\S))\*\*"
    r"|\*(?P<emphasis>[^\s*](?:[^*]*[^\s*])?)\*",
    re.DOTALL,
)
_SCHEMES = ("http", "https", "mailto")
# What no HTML document may hold, and no UTF-8 file.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_NUMBER = re.compile(
    r"((?<!\w)[-+\u2212])?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?(?:\s?([a-zA-Z\u00b5\u03bc]+)\b)?"
)
_TIMES = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZES = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS = {**_TIMES, **_SIZES}
_NUMERIC = ' class="number"'


class Page:
    """A page that is one file: pictures are inside, nothing is loaded, dark where the reader's system is.

    Blocks are added from top to bottom. Text, captions, headings and the cells of tables are escaped and may hold
    ``code``, bold, emphasis and links as Markdown writes them; a backslash takes a character as it is.

    Args:
        title: of the document and over the page, plain text.
        subtitle: a line of text below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._blocks: list[str] = []
        self._contents: list[tuple[int, str, str]] = []  # level, id, text as HTML
        self._has_table = False

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section; it enters the list of contents.

        Args:
            level: 2 to 6.

        Raises:
            ArgumentError: another level.
        """
        require_positive_int("level", level, minimum=2, maximum=6)
        shown = _inline(text)
        name = re.sub(r"[^a-z0-9]+", "-", _plain(shown).lower()).strip("-") or "section"
        taken = {entry[1] for entry in self._contents}
        name = next(n for n in (name, *(f"{name}-{k}" for k in range(2, len(taken) + 3))) if n not in taken)
        self._contents.append((level, name, shown))
        self._blocks.append(f'<h{level} id="{name}">{shown}</h{level}>')

    def text(self, markdown: str) -> None:
        """Paragraphs, between empty lines.

        A link whose address has another scheme than http, https or mailto stays text.
        """
        for paragraph in re.split(r"\n\s*\n", markdown.strip()):
            if paragraph:
                self._blocks.append(f"<p>{_inline(paragraph.strip())}</p>")

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> None:
        """A table, scrolled in its own box where it is wider than the page. A click on a name sorts by that column.

        Args:
            header: names of the columns.
            rows: cells of each row; what is no text is written by ``str``.
            numbers: which columns, from 0, hold numbers: on the right, sorted by the first number of each cell, in
                seconds or bytes where a unit of these follows; cells without one come last.

        Raises:
            ArgumentError: a row of another length, or a column that is not there.
        """
        count, numeric, lines = len(header), set(numbers), []
        if not numeric <= set(range(count)):
            raise ArgumentError(f"numbers: expected columns in 0..{count - 1}, got {sorted(numeric)}")
        for index, row in enumerate(rows):
            if len(row) != count:
                raise ArgumentError(f"rows: expected {count} cells as in the header, got {len(row)} in row {index}")
            lines.append("<tr>" + "".join(_cell(str(c), k in numeric) for k, c in enumerate(row)) + "</tr>")
        names = [_inline(str(name)) for name in header]
        head = "".join(f'<th scope="col"{_NUMERIC if k in numeric else ""}>{n}</th>' for k, n in enumerate(names))
        body = "\n".join(lines)
        self._has_table = True
        self._blocks.append(
            '<div class="scroll" role="region" aria-label="Table" tabindex="0">\n'
            f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )

    def picture(self, data: bytes | os.PathLike[str], alt: str, caption: str = "", width: int | None = None) -> None:
        """A picture, embedded.

        Args:
            data: PNG, GIF, JPEG or SVG, as bytes or a file.
            alt: what it shows, for those who cannot see it.
            caption: text under it.
            width: in CSS pixels; by default its own. Never wider than the page.

        Raises:
            MissingFileError: no such file.
            ArgumentError: another type of picture.
        """
        if width is not None:
            require_positive_int("width", width)
        if isinstance(data, bytes):
            source, content = "these bytes", data
        else:
            path = Path(data)
            if not path.is_file():
                raise MissingFileError(f"data: no file {path}")
            source, content = str(path), path.read_bytes()
        kind = _media_type(content)
        if kind is None:
            raise ArgumentError(f"data: expected a PNG, GIF, JPEG or SVG picture, got {source}")
        size = "" if width is None else f' width="{width}"'
        address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
        below = f"\n<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        self._blocks.append(f'<figure>\n<img src="{address}" alt="{_escape(alt)}"{size}>{below}\n</figure>')

    def code(self, text: str) -> None:
        """Lines of code or output, as they are."""
        self._blocks.append(f'<pre class="scroll" tabindex="0"><code>{_escape(text)}</code></pre>')

    def html(self) -> str:
        """The whole document."""
        title = _escape(self._title)
        parts = [f"<h1>{title}</h1>"]
        if self._subtitle:
            parts.append(f'<p class="subtitle">{_inline(self._subtitle)}</p>')
        if len(self._contents) > 1:
            entries = "\n".join(
                f'<li class="level-{level}"><a href="#{name}">{_without_links(text)}</a></li>'
                for level, name, text in self._contents
            )
            parts.append(f'<nav aria-label="Contents">\n<ul>\n{entries}\n</ul>\n</nav>')
        body = "\n".join([*parts, *self._blocks])
        script = f"<script>{_SCRIPT}</script>\n" if self._has_table else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n{script}</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the document, whole or not; what was there is replaced. Returns the path.

        Raises:
            DiskFullError: there is no room; the file is as it was.
        """
        write_text(Path(path), self.html())
        return Path(path)


def _escape(text: str) -> str:
    return html.escape(_ILLEGAL.sub("\ufffd", text), quote=True)


def _inline(text: str) -> str:
    """HTML of text with Markdown's code, bold, emphasis and links."""
    parts, done = [], 0
    for found in _MARKUP.finditer(text):
        parts += [_escape(text[done : found.start()]), _marked(found)]
        done = found.end()
    return "".join([*parts, _escape(text[done:])])


def _marked(found: re.Match[str]) -> str:
    if found["literal"]:
        return _escape(found["literal"])
    if found["code"]:
        return f"<code>{_escape(found['code'])}</code>"
    if found["bold"]:
        return f"<strong>{_inline(found['bold'])}</strong>"
    if found["emphasis"]:
        return f"<em>{_inline(found['emphasis'])}</em>"
    if not _is_harmless(found["address"]):
        return _escape(found[0])
    return f'<a href="{_escape(found["address"])}">{_without_links(_inline(found["link"]))}</a>'


def _is_harmless(address: str) -> bool:
    """Whether a link leads to a place on this page, beside it, on the web, or to a mail address, and runs nothing."""
    if _ILLEGAL.search(address):
        # Browsers leave some of these out before they look for a scheme.
        return False
    scheme, colon, _ = address.partition(":")
    return not colon or bool(re.search(r"[/?#]", scheme)) or scheme.lower() in _SCHEMES


def _without_links(shown: str) -> str:
    return re.sub(r"</?a\b[^>]*>", "", shown)


def _plain(shown: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", shown))


def _cell(text: str, is_number: bool) -> str:
    shown = _inline(text)
    if not is_number:
        return f"<td>{shown}</td>"
    value = _value(_plain(shown))
    marker = "" if value is None else f' data-value="{value!r}"'
    return f"<td{_NUMERIC}{marker}>{shown}</td>"


def _value(text: str) -> float | None:
    """The first number of a cell, times the unit of time or bytes that follows it; None without one."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    sign, whole, fraction, exponent, unit = found.groups("")
    value = float(whole.replace(",", "") + fraction + exponent) * _UNITS.get(unit, 1.0)
    if not math.isfinite(value):
        return None
    return -value if sign in ("-", "\u2212") else value


def _media_type(content: bytes) -> str | None:
    for kind, beginning in (("png", b"\x89PNG\r\n\x1a\n"), ("gif", b"GIF8"), ("jpeg", b"\xff\xd8\xff")):
        if content.startswith(beginning):
            return f"image/{kind}"
    start = content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return "image/svg+xml" if start.startswith((b"<?xml", b"<!", b"<svg")) and b"<svg" in start else None


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #5b6470; --line: #d9dee4; --shade: #f4f6f8;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e7ea; --soft: #9aa4af; --line: #343b43; --shade: #1e242a; --link: #7db8f0; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem clamp(0.9rem, 4vw, 2.5rem) 4rem; }
h1, h2, h3, h4, h5, h6 { line-height: 1.25; margin: 2.2rem 0 0.6rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; margin-top: 0.5rem; }
h2 { font-size: 1.35rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; }
h4, h5, h6 { font-size: 1rem; }
p { max-width: 46rem; margin: 0.7rem 0; overflow-wrap: anywhere; }
.subtitle, figcaption { color: var(--soft); }
a { color: var(--link); }
nav { margin: 1.2rem 0; }
nav ul { list-style: none; margin: 0; padding: 0; columns: 16rem; }
nav li { padding: 0.1rem 0; break-inside: avoid; }
.level-3 { padding-left: 1.2rem; }
.level-4, .level-5, .level-6 { padding-left: 2.4rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.35rem 0.75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--shade); vertical-align: bottom; font-weight: 600; text-wrap: balance; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:not(.number) { min-width: 8rem; }
th.number { min-width: 5rem; }
td.number { white-space: nowrap; }
th button { all: unset; cursor: pointer; }
th button:hover { text-decoration: underline; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort] button::after { content: " \\25b2"; font-size: 0.7em; }
th[aria-sort="descending"] button::after { content: " \\25bc"; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
code { background: var(--shade); padding: 0.1em 0.3em; border-radius: 3px; }
pre { background: var(--shade); padding: 0.8rem 1rem; border-radius: 5px; }
pre code { padding: 0; background: none; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: 0.92rem; margin-top: 0.4rem; max-width: 46rem; }
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""

# Names of columns become buttons here, so that a page without scripts shows none.
_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button"), numeric = head.classList.contains("number");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const compare = (a, b) => {
        if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
        const [x, y] = [a.dataset.value, b.dataset.value];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (x - y);
      };
      body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column])));
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    });
  });
}
"""
