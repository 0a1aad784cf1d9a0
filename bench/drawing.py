"""Pictures of recorded results: what they show, as data, and how that is drawn.

A picture names its data and this file in its PNG's text, so that whether it is up to date can be told without drawing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.units import seconds, size
from fastvq.errors import UnavailableError

# Okabe and Ito's colours, which people who are colour-blind can tell apart, each with a marker.
_STYLES = (
    ("#000000", "o"),
    ("#E69F00", "s"),
    ("#0072B2", "D"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#D55E00", "P"),
    ("#56B4E9", "X"),
    ("#999999", "*"),
    ("#E69F00", "|"),
)
_KEY = "fastvq"
_DPI = 200


@dataclass(frozen=True)
class Point:
    """A value of y at x, or of x in a row.

    Attributes:
        guessed: it rests on an extrapolated time; drawn hollow.
        note: written below it, or above where there are points below.
    """

    x: float
    y: float
    guessed: bool = False
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by lines unless ``rows`` of a panel hold them.

    Attributes:
        style: of `_STYLES`; the same for the same thing in all panels.
    """

    label: str
    points: tuple[Point, ...]
    style: int


@dataclass(frozen=True)
class Panel:
    """Axes, both logarithmic.

    Attributes:
        units: of y, or of x where there are rows: ``seconds``, ``bytes`` or ``times``.
        ticks: of x, at the values that were measured.
        rows: names of rows, the first on top; y is then the index of a row.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    units: str = "seconds"
    ticks: tuple[float, ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Panels side by side, and what is said under them.

    Attributes:
        alt: what it shows, for those who cannot see it.
        caption: plain text; names machine, versions, commit and date.
        files: recorded ones that it is made of.
        share_y: the same values of y at the same height in all panels.
        height: in inches, of a width of 9.
    """

    name: str
    alt: str
    caption: str
    files: tuple[str, ...]
    panels: tuple[Panel, ...]
    share_y: bool = True
    height: float = 3.3

    @property
    def digest(self) -> str:
        """Of its data and of how it is drawn."""
        content = json.dumps(dataclasses.asdict(self)) + Path(__file__).read_text()
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def is_current(picture: Picture, path: Path) -> bool:
    """Whether a file is this picture as it would be drawn now."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        text: dict[str, Any] = getattr(image, "text", {})
        return text.get(_KEY) == picture.digest


def draw(picture: Picture) -> bytes:
    """A PNG, 1800 pixels wide.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError(f'pictures need matplotlib ({error}); pip install "fastvq[bench]"') from error
    with rc_context({"font.size": 8.5, "axes.titlesize": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, picture.height), dpi=_DPI, layout="constrained")
        every = figure.subplots(1, len(picture.panels), squeeze=False, sharey=picture.share_y)[0]
        for index, (axes, panel) in enumerate(zip(every, picture.panels, strict=True)):
            _panel(axes, panel, first=index == 0 or not picture.share_y)
        _legend(figure, picture.panels)
        file = io.BytesIO()
        # Without matplotlib's version, a picture stays the same where its data do.
        about = {"Software": None, "Description": picture.caption, _KEY: picture.digest}
        figure.savefig(file, format="png", metadata=about)
        return file.getvalue()


def _panel(axes: Any, panel: Panel, *, first: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(panel.title, loc="left")
    axes.set_xscale("log")
    axes.set_xlabel(panel.x_label)
    measured = axes.xaxis
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    else:
        axes.set_yscale("log")
        axes.set_xticks(panel.ticks, [f"{tick:.0f}" for tick in panel.ticks])
        axes.minorticks_off()
        measured = axes.yaxis
        # Room for the notes below the lowest points.
        axes.margins(x=0.16, y=0.14)
    if first:
        axes.set_ylabel(panel.y_label)
    words = {"seconds": seconds, "bytes": size, "times": lambda value: f"{value:g}"}[panel.units]
    if panel.units == "times":
        measured.set_major_locator(LogLocator(subs=(1, 2, 5)))
        measured.set_minor_locator(NullLocator())
    measured.set_major_formatter(lambda value, _: words(value))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    lowest: dict[float, float] = {}
    for point in (point for series in panel.series for point in series.points):
        lowest[point.x] = min(point.y, lowest.get(point.x, point.y))
    for series in panel.series:
        _series(axes, series, lowest, joined=not panel.rows)


def _series(axes: Any, series: Series, lowest: Mapping[float, float], *, joined: bool) -> None:
    color, marker = _STYLES[series.style]
    points = series.points
    if joined:
        for before, after in itertools.pairwise(points):
            dashes = "--" if before.guessed or after.guessed else "-"
            axes.plot([before.x, after.x], [before.y, after.y], dashes, color=color, linewidth=1.3)
    for point in points:
        face = "white" if point.guessed else color
        wide = 12 if marker == "|" else 5
        axes.plot(point.x, point.y, marker, color=color, markerfacecolor=face, markersize=wide, markeredgewidth=1.3)
        if point.note:
            # Above what is drawn below it.
            up = point.y > lowest[point.x]
            where = {"xytext": (0, 7 if up else -7), "va": "bottom" if up else "top", "ha": "center"}
            axes.annotate(point.note, (point.x, point.y), textcoords="offset points", color=color, **where)


def _legend(figure: Any, panels: Sequence[Panel]) -> None:
    from matplotlib.lines import Line2D

    every = [series for panel in panels for series in panel.series]
    joined = not any(panel.rows for panel in panels)
    handles = []
    for label, style in dict.fromkeys((series.label, series.style) for series in every):
        color, marker = _STYLES[style]
        line = "-" if joined else ""
        wide = 9 if marker == "|" else 5
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=line, markersize=wide, label=label))
    if any(point.guessed for series in every for point in series.points):
        look = {"color": "#555555", "marker": "o", "markerfacecolor": "white", "linestyle": "--" if joined else ""}
        handles.append(Line2D([], [], **look, markersize=5, label="extrapolated from a part of the work"))
    columns = len(handles) if len(handles) <= 4 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
