"""What the naive and the cached sampler compute at each position of a grid, of the shipped prior of bottom codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes

from drawing.style import INK, ORANGE, PALE, RED, SKY, amount, bare, cell, figure, frame
from fastvq import Pipeline, PixelSNAIL
from fastvq.sampling import describe

PLACE = (9, 5)  # the position that the picture shows


@dataclass(frozen=True)
class Counts:
    """Operations (a multiplication and an addition are two) of one sample.

    Attributes:
        naive: at each position of each row, [H][W].
        row: of the cached sampler when a row begins.
        step: of the cached sampler at each position.
        layers: from the first to the logits, whether they read rows above.
    """

    shape: tuple[int, int]
    naive: list[list[int]]
    row: int
    step: int
    layers: list[bool]

    @property
    def naive_total(self) -> int:
        return sum(map(sum, self.naive))

    @property
    def cached_total(self) -> int:
        height, width = self.shape
        return height * (self.row + width * self.step)


def shipped() -> PixelSNAIL:
    """16 x 16 codes, no attention."""
    return cast(PixelSNAIL, Pipeline.from_pretrained("emoji").priors[1])


def counts(prior: PixelSNAIL) -> Counts:
    """Of a prior without attention, whose costs are the same at all positions of a row."""
    found = describe(prior)
    height, width = found.shape
    # At row r the naive sampler runs the network over r + 1 rows, for each of the columns.
    one_row = found.naive_flops // (width * height * (height + 1) // 2)
    layers = [True]
    for block in prior.blocks:
        layers += [True] * len(block.layers) + [False]  # type: ignore[arg-type, union-attr]
    layers += [False] * (len(prior.output_blocks) + 1)
    return Counts(
        found.shape,
        [[(row + 1) * one_row] * width for row in range(height)],
        found.row_flops // height,
        found.step_flops // (height * width),
        layers,
    )


def draw(path: Path) -> None:
    found = counts(shipped())
    (height, width), (row, column) = found.shape, PLACE
    with figure(path, 5.3) as drawn:
        grid = drawn.add_gridspec(
            3, 3, height_ratios=(1, 0.5, 0.95), left=0.08, right=0.98, top=0.915, bottom=0.09, hspace=0.2, wspace=0.1
        )
        kinds = (
            ("naive, at every position", ORANGE, found.naive[row][column]),
            ("cached, once when a row begins", SKY, found.row),
            ("cached, at every position", RED, found.step),
        )
        for place, (title, colour, flops) in enumerate(kinds):
            top = drawn.add_subplot(grid[0, place])
            top.set_title(f"{title}\n{amount(flops, 'FLOP')}", pad=6)
            _grid(top, found.shape, place, colour)
            below = drawn.add_subplot(grid[1, place])
            _layers(below, found, place, colour)
            if place == 0:
                top.text(-0.9, height / 2, f"{height} x {width} codes", rotation=90, va="center", ha="center")
                below.text(-0.9, len(found.layers) / 2, "layers", rotation=90, va="center", ha="center")
        _course(drawn.add_subplot(grid[2, :]), found)


def _grid(axes: Axes, shape: tuple[int, int], place: int, colour: str) -> None:
    """Positions that are computed when the code at PLACE is drawn, or when its row begins."""
    height, width = shape
    row, column = PLACE
    bare(axes, height, width)
    for r in range(height):
        for c in range(width):
            now = (r <= row, r == row, (r, c) == PLACE)[place]
            known = r < row or (r == row and c < column and place != 1)
            cell(axes, r, c, colour if now else PALE if known else "white")
    if place != 1:
        frame(axes, row, column)


def _layers(axes: Axes, found: Counts, place: int, colour: str) -> None:
    """The row of PLACE, layer by layer, the first at the bottom."""
    width, column = found.shape[1], PLACE[1]
    bare(axes, len(found.layers), width)
    for index, above in enumerate(reversed(found.layers)):
        for c in range(width):
            now = (True, above, c == column)[place]
            cell(axes, index, c, colour if now else PALE if place == 2 and c < column else "white")


def _course(axes: Axes, found: Counts) -> None:
    height, width = found.shape
    naive = [flops for row in found.naive for flops in row]
    cached = [found.step + (found.row if column == 0 else 0) for _ in range(height) for column in range(width)]
    positions = range(1, height * width + 1)
    axes.set_yscale("log")
    axes.step(positions, naive, where="mid", color=ORANGE, linewidth=1.8)
    axes.step(positions, cached, where="mid", color=RED, linewidth=1.2)
    axes.scatter(positions[::width], cached[::width], color=SKY, s=14, zorder=3)
    axes.set_xlim(0, height * width + 1)
    axes.set_ylim(min(cached) / 2.5, max(naive) * 4)
    axes.set_xticks([1, *range(64, height * width + 1, 64)])
    axes.set_xlabel("position, in the order of sampling")
    axes.set_ylabel("FLOP")
    total = amount(found.naive_total, "FLOP")
    axes.text(positions[-1], max(naive) * 1.5, f"naive: {total} for the grid", ha="right", va="bottom", color=INK)
    total = amount(found.cached_total, "FLOP")
    times = f"{found.naive_total / found.cached_total:.0f} times less"
    axes.text(positions[-1], max(cached) * 1.7, f"cached: {total}, {times}", ha="right", va="bottom", color=INK)
