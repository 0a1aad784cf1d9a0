"""Where things lie that positions of a front leave for later ones, and the positions of one tile step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq.sampling.plan import Front, History, Tap


class Layout(NamedTuple):
    """Rows of a grid of which the last few are kept, with room beside the grid.

    Attributes:
        rows: that are kept; row r lies at r modulo this.
        left: columns of nothing left of the grid.
        columns: of a row, what is left and right of the grid included.
    """

    rows: int
    left: int
    columns: int

    @classmethod
    def rolling(cls, front: Front, history: History) -> Layout:
        """What the positions of a front read of a past like this.

        A row is first written when it is the lowest of the active ones, so the topmost active row is then at most
        ``front.rows - 1`` above it and reads ``history.above`` rows further up. Whatever lay in its place, a row
        ``front.rows + history.above`` further up or the zeros of a row above the grid, is not read from then on; and
        what is not yet written of a row is not read before, as the front has it.
        """
        return cls(front.rows + history.above, history.left, history.left + front.shape[1] + history.right)

    @classmethod
    def whole(cls, front: Front, history: History) -> Layout:
        """All rows of the grid, and those above it."""
        return cls(front.shape[0] + history.above, history.left, history.left + front.shape[1] + history.right)


class Turn(NamedTuple):
    """Positions that are sampled together: one column of each active tile.

    Attributes:
        entries: theirs among the entries of the tile step.
        positions: row and column of each.
    """

    entries: slice
    positions: list[tuple[int, int]]


class TileStep:
    """The positions of one step of a front in all samples: entry n * B + b is position n of sample b.

    Columns of the tiles come one after the other, and in each the rows from the top.

    Attributes:
        turns: in the order in which they are sampled.
        entries: all of them.
        samples, rows, columns: int64 [N * B], of each entry.
    """

    def __init__(self, front: Front, step: int, batch: int, device: torch.device) -> None:
        active = list(front.active(step))
        widest = max((len(columns) for _, columns in active), default=0)
        self.turns: list[Turn] = []
        positions: list[tuple[int, int]] = []
        for turn in range(widest):
            chosen = [(row, columns[turn]) for row, columns in active if turn < len(columns)]
            first = len(positions) * batch
            self.turns.append(Turn(slice(first, first + len(chosen) * batch), chosen))
            positions += chosen
        self.entries = slice(0, len(positions) * batch)
        places = torch.tensor(positions, dtype=torch.int64).reshape(-1, 2).repeat_interleave(batch, 0).T.to(device)
        self.rows, self.columns = places.contiguous()
        self.samples = torch.arange(batch, device=device).repeat(len(positions))
        self._addresses: dict[tuple[Layout, tuple[Tap, ...]], Tensor] = {}

    def at(self, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, row and column of every entry of a turn."""
        return self.samples[turn.entries], self.rows[turn.entries], self.columns[turn.entries]

    def addresses(self, layout: Layout, taps: tuple[Tap, ...]) -> Tensor:
        """Places in a :class:`Store` of what every entry reads: int64 [N * B, T]."""
        found = self._addresses.get((layout, taps))
        if found is None:
            above, left = torch.tensor(taps, device=self.rows.device).T
            rows = (self.rows[:, None] + above) % layout.rows
            columns = self.columns[:, None] + (left + layout.left)
            found = (self.samples[:, None] * layout.rows + rows) * layout.columns + columns
            self._addresses[layout, taps] = found
        return found


class Store:
    """What positions leave for later ones: a vector or a number of each, in rows as ``layout`` has them.

    Args:
        start: [B, R, columns, C] or [B, R, columns], what is there before anything is written.
    """

    def __init__(self, layout: Layout, start: Tensor) -> None:
        self.layout, self.grid = layout, start
        self._flat = start.flatten(0, 2)

    @classmethod
    def zeros(cls, layout: Layout, batch: int, channels: int, device: torch.device) -> Store:
        sizes = (batch, layout.rows, layout.columns, channels)
        return cls(layout, torch.zeros(sizes, dtype=torch.float32, device=device))

    def read(self, tile: TileStep, entries: slice, taps: tuple[Tap, ...]) -> Tensor:
        """What lies at the taps of some entries, in the order of the taps: [N, T * C] or [N, T]."""
        addresses = tile.addresses(self.layout, taps)[entries]
        return self._flat.index_select(0, addresses.flatten()).view(len(addresses), -1)

    def write(self, tile: TileStep, entries: slice, values: Tensor) -> None:
        """Leave vectors [N, C] of some entries."""
        self._flat.index_copy_(0, tile.addresses(self.layout, ((0, 0),))[entries].flatten(), values)
