"""The tiles in which nearest codes are found, and the bytes that go to and from main memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from drawing.style import BLUE, GREEN, INK, LINE, ORANGE, PALE, RED, SKY, amount, figure

SIZES = (65536, 8192, 64)  # N, K, D
TILE = (32, 12)  # vectors and codes whose products are in registers at a time, with AVX-512
_FLOAT, _INDEX, _SHORT_INDEX = 4, 8, 4  # bytes


def by_matrix(n: int, k: int, d: int) -> dict[str, int]:
    """Bytes read and written where each step is an operation of its own and the averages come from one-hot rows."""
    vectors, codes, scores = n * d * _FLOAT, k * d * _FLOAT, n * k * _FLOAT
    return {
        "product": vectors + codes + scores,
        "least": scores + n * _INDEX,
        "one-hot": n * _INDEX + scores,
        "sums": scores + vectors + codes,
    }


def in_one_pass(n: int, k: int, d: int) -> dict[str, int]:
    """Bytes of the fused search, and of the sums, which read the vectors a second time, sorted by their codes."""
    vectors, codes = n * d * _FLOAT, k * d * _FLOAT
    search = vectors + codes + n * (_INDEX + _SHORT_INDEX)
    # Indices are read to count and to sort; the order is written, and read beside the vectors.
    sums = 2 * n * _SHORT_INDEX + 2 * n * _INDEX + vectors + codes
    return {"search": search, "sums": sums}


def draw(path: Path) -> None:
    with figure(path, 3.3) as drawn:
        grid = drawn.add_gridspec(
            2, 1, height_ratios=(1.35, 1), left=0.02, right=0.98, top=0.99, bottom=0.01, hspace=0.22
        )
        _tiling(drawn.add_subplot(grid[0]))
        _bytes(drawn.add_subplot(grid[1]))


def _tiling(axes: Axes) -> None:
    """Not to scale: a block of vectors, and the codes that pass by."""
    axes.set_xlim(0, 14)
    axes.set_ylim(4.7, -0.1)
    axes.set_axis_off()
    axes.add_patch(Rectangle((2.6, 0), 8, 4, facecolor="white", edgecolor=LINE, linewidth=1))
    axes.text(6.6, 4.45, "K codes; the scores of this matrix never exist together", ha="center", va="center")
    axes.text(0.9, 2.0, "N vectors", rotation=90, ha="center", va="center")
    axes.add_patch(Rectangle((1.5, 0), 0.7, 4, facecolor=PALE, edgecolor=LINE))
    axes.add_patch(Rectangle((1.5, 1), 0.7, 0.9, facecolor=SKY, edgecolor=INK))
    axes.add_patch(Rectangle((2.6, 1), 2.4, 0.9, facecolor=PALE, edgecolor=LINE))
    axes.add_patch(Rectangle((5.0, 1), 0.7, 0.9, facecolor=RED, edgecolor=INK))
    axes.add_patch(FancyArrowPatch((5.85, 1.45), (10.4, 1.45), arrowstyle="->", mutation_scale=12, color=INK))
    axes.text(8.15, 1.05, "next codes", ha="center", va="center", fontsize=8)
    axes.text(3.8, 1.46, "done", ha="center", va="center", fontsize=8)
    tile = f"in registers: {TILE[0]} vectors x {TILE[1]} codes,\nover all D numbers"
    axes.annotate(tile, (5.35, 1.9), (6.6, 3.0), ha="center", va="center", fontsize=8, arrowprops={"arrowstyle": "-"})
    axes.add_patch(Rectangle((11.0, 0), 0.7, 4, facecolor="white", edgecolor=LINE))
    axes.add_patch(Rectangle((11.0, 0), 0.7, 1, facecolor=PALE, edgecolor=LINE))
    axes.add_patch(Rectangle((11.0, 1), 0.7, 0.9, facecolor=GREEN, edgecolor=INK))
    axes.text(11.95, 1.45, "least so far,\nand its code", ha="left", va="center", fontsize=8)
    axes.text(11.95, 0.5, "found", ha="left", va="center", fontsize=8)


def _bytes(axes: Axes) -> None:
    n, k, d = SIZES
    axes.set_title(f"bytes to and from memory, N = {n}, K = {k}, D = {d}, with the sums of the averages", pad=4)
    total = sum(by_matrix(*SIZES).values())
    colours = {"product": ORANGE, "least": BLUE, "one-hot": GREEN, "sums": SKY, "search": RED}
    axes.set_xlim(-0.23 * total, 1.14 * total)
    axes.set_ylim(1.5, -0.5)
    axes.set_axis_off()
    for place, (name, parts) in enumerate(
        (("with the matrix", by_matrix(*SIZES)), ("in one pass", in_one_pass(*SIZES)))
    ):
        axes.text(-0.015 * total, place, name, ha="right", va="center")
        left = 0
        for part, size in parts.items():
            wide = size > total / 20
            edge = "white" if wide else colours[part]  # a white one would hide a thin bar
            axes.barh(place, size, left=left, height=0.62, color=colours[part], edgecolor=edge, linewidth=0.8)
            if wide:
                ink = "white" if part in ("least", "one-hot") else INK
                axes.text(left + size / 2, place, part, ha="center", va="center", color=ink)
            left += size
        axes.text(left + 0.015 * total, place, amount(left, "B"), ha="left", va="center")
