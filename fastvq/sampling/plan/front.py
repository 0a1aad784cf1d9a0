"""In which order the positions of a grid are sampled: tile by tile, along a front that is skewed against the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Front:
    """A grid cut into tiles of ``tile`` columns of one row, and the steps in which they are sampled.

    A row is ``offset`` tiles ahead of the row below. Everything that a tile reads in rows above has then been sampled
    in earlier steps, and the tiles of a step are independent of each other. Within a tile, columns follow one another.

    Attributes:
        shape: rows and columns of the grid.
        skew: a position may read columns up to ``skew * d - 1`` to its right in the row ``d`` above. Raster order is
            a skew of the whole width.
        tile: 1 to the width; a tile as wide as the grid is raster order.
    """

    shape: tuple[int, int]
    skew: int
    tile: int

    @property
    def tiles(self) -> int:
        """Of a row; the last may be narrower."""
        return -(-self.shape[1] // self.tile)

    @property
    def offset(self) -> int:
        """Tiles that a row is ahead of the one below it; at most a whole row, so that no step is empty."""
        return min(self.tiles, 1 + (self.tile + self.skew - 2) // self.tile)

    @property
    def steps(self) -> int:
        """Tile steps of a grid."""
        return self.tiles + self.offset * (self.shape[0] - 1)

    @property
    def dependent_steps(self) -> int:
        """Positions that are sampled one after the other, each with those of other rows."""
        return self.steps * self.tile if self.tiles > 1 else self.shape[0] * self.shape[1]

    @property
    def rows(self) -> int:
        """Most rows that have a tile in one step."""
        return min(self.shape[0], -(-self.tiles // self.offset))

    def active(self, step: int) -> Iterator[tuple[int, range]]:
        """Rows that have a tile in this step, from the top, and the columns of that tile."""
        height, width = self.shape
        first = max(0, -(-(step - self.tiles + 1) // self.offset))
        for row in range(first, min(height, step // self.offset + 1)):
            column = (step - self.offset * row) * self.tile
            yield row, range(column, min(column + self.tile, width))

    def last_rows(self, step: int) -> int:
        """Rows from the top that are complete after this step."""
        return min(self.shape[0], max(0, (step - self.tiles + 1) // self.offset + 1))


def raster(shape: tuple[int, int]) -> Front:
    """Position by position, row by row."""
    return Front(shape, skew=shape[1], tile=shape[1])
