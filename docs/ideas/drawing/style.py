"""How the pictures look: one palette (Okabe and Ito's, which colour-blind readers can tell apart), font and width."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

INK, LINE, PALE = "#222222", "#b8b8b8", "#e4e4e4"
BLUE, SKY, ORANGE, RED, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
WIDTH = 7.0  # inches; pages show it 700 pixels wide
DPI = 140


@contextmanager
def figure(path: Path, height: float) -> Iterator[Figure]:
    """A figure of the common width that is written to ``path`` at the end."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "text.color": INK,
                "axes.edgecolor": LINE,
                "axes.labelcolor": INK,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.titlesize": 9,
                "xtick.color": INK,
                "ytick.color": INK,
            }
        )
        drawn = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        yield drawn
        written = io.BytesIO()
        drawn.savefig(written, format="png")
        # A palette makes a third of it.
        Image.open(written).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def bare(axes: Axes, rows: float, columns: float, *, margin: float = 0.1) -> None:
    """Axes on which a grid of unit cells is drawn, the first row at the top."""
    axes.set_xlim(-margin, columns + margin)
    axes.set_ylim(rows + margin, -margin)
    axes.set_axis_off()


def cell(axes: Axes, row: float, column: float, colour: str, *, edge: str = LINE, width: float = 0.5) -> None:
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=edge, linewidth=width))


def frame(axes: Axes, row: float, column: float, rows: float = 1, columns: float = 1, colour: str = INK) -> None:
    """An outline on top of cells."""
    axes.add_patch(Rectangle((column, row), columns, rows, fill=False, edgecolor=colour, linewidth=1.8, zorder=3))


def amount(value: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
