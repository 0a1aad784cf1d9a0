"""What tensors of a traced network are, at each position: functions of its code, or sums over operations of a plan.

Place (i, j) is that of the tensor, also where it is larger or smaller than the grid. Operations and codes are known on
the grid and zero outside of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sources beside operations: codes, and a one at every position of the grid.
CODES, ONES = -1, -2


@dataclass(frozen=True, eq=False)
class Piece:
    """What a place reads of a source at (i + dr, j + dc), times a weight.

    Attributes:
        source: index of an operation, `CODES` or `ONES`.
        weight: [C_in, C_out]; of codes [K, C_out], of ones [1, C_out]. Or (start, stop): channels of the source as
            they are.
    """

    source: int
    dr: int
    dc: int
    weight: Tensor | tuple[int, int]

    def moved(self, dr: int, dc: int) -> Piece:
        return dataclasses.replace(self, dr=self.dr + dr, dc=self.dc + dc)

    def cut(self, start: int, stop: int) -> Piece:
        """Some of its channels."""
        if isinstance(self.weight, tuple):
            first = self.weight[0]
            return dataclasses.replace(self, weight=(first + start, first + stop))
        return dataclasses.replace(self, weight=self.weight[:, start:stop])


@dataclass(frozen=True, eq=False)
class Linear:
    """A sum of pieces and a bias [C], None for 0, on a window of ``rows`` by ``columns`` places.

    Attributes:
        origin: what these are channels of, and from which one on.
    """

    channels: int
    rows: int
    columns: int
    pieces: tuple[Piece, ...]
    bias: Tensor | None = None
    origin: tuple[Linear, int] | None = None

    @property
    def alone(self) -> Piece | None:
        """The one piece that it is, channels of an operation as they are."""
        if len(self.pieces) == 1 and self.bias is None and isinstance(self.pieces[0].weight, tuple):
            return self.pieces[0]
        return None

    def window(self, top: int, left: int, rows: int, columns: int) -> Linear:
        """What is seen from a place on."""
        pieces = tuple(piece.moved(top, left) for piece in self.pieces)
        return Linear(self.channels, rows, columns, pieces, self.bias)

    def cut(self, start: int, stop: int) -> Linear:
        if (start, stop) == (0, self.channels):
            return self
        pieces = tuple(piece.cut(start, stop) for piece in self.pieces)
        bias = None if self.bias is None else self.bias[start:stop]
        whole, first = self.origin or (self, 0)
        return Linear(stop - start, self.rows, self.columns, pieces, bias, (whole, first + start))

    def plus(self, other: Linear) -> Linear:
        if self.bias is None or other.bias is None:
            bias = other.bias if self.bias is None else self.bias
        else:
            bias = self.bias + other.bias
        return Linear(self.channels, self.rows, self.columns, self.pieces + other.pieces, bias)

    def shifted_by(self, constant: Tensor) -> Linear:
        """With a vector [C] added."""
        bias = constant if self.bias is None else self.bias + constant
        return Linear(self.channels, self.rows, self.columns, self.pieces, bias)

    def scaled(self, factor: Tensor, dense: Callable[[Piece], Tensor]) -> Linear:
        """Times a vector [C]; ``dense`` gives a piece's weights as a matrix."""
        pieces = tuple(dataclasses.replace(piece, weight=dense(piece) * factor) for piece in self.pieces)
        bias = None if self.bias is None else self.bias * factor
        return Linear(self.channels, self.rows, self.columns, pieces, bias)


@dataclass(frozen=True, eq=False)
class Joined:
    """Vectors one after the other, all on the same window."""

    parts: tuple[Linear, ...]

    @property
    def channels(self) -> int:
        return sum(part.channels for part in self.parts)

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    def cut(self, start: int, stop: int) -> Joined:
        found, first = [], 0
        for part in self.parts:
            low, high = max(0, start - first), min(part.channels, stop - first)
            if low < high:
                found.append(part.cut(low, high))
            first += part.channels
        return Joined(tuple(found))

    def bounds(self) -> list[int]:
        found = [0]
        for part in self.parts:
            found.append(found[-1] + part.channels)
        return found


@dataclass(frozen=True, eq=False)
class Table:
    """A function of the code at (i + dr, j + dc): its values for all codes [K, C], and [1, C] outside of the grid.

    Attributes:
        outside: None as long as no place outside has been seen.
    """

    values: Tensor
    outside: Tensor | None
    dr: int
    dc: int
    rows: int
    columns: int

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    def apply(self, function: Callable[[Tensor], Tensor]) -> Table:
        """A function of rows of [N, C]."""
        if self.outside is None:
            return dataclasses.replace(self, values=function(self.values))
        both = function(torch.cat([self.values, self.outside]))
        return dataclasses.replace(self, values=both[:-1], outside=both[-1:])

    def window(self, top: int, left: int, rows: int, columns: int, grid: tuple[int, int]) -> Table:
        moved = dataclasses.replace(self, dr=self.dr + top, dc=self.dc + left, rows=rows, columns=columns)
        inside = (
            0 <= moved.dr <= grid[0] - rows and 0 <= moved.dc <= grid[1] - columns
        )  # then what is outside may be anything
        return dataclasses.replace(moved, outside=None) if inside else moved

    def like(self, other: Table) -> bool:
        """Whether both read the same place."""
        return (self.dr, self.dc) == (other.dr, other.dc)

    def linear(self, weight: Tensor | None = None) -> Linear:
        """As a sum, times a matrix [C, C_out]."""
        values, bias = self.values.float(), None
        if self.outside is not None:
            bias = self.outside.float()
            values, bias = values - bias, bias[0]
        if weight is not None:
            values, bias = values @ weight, None if bias is None else bias @ weight
        if bias is not None and not bool(bias.any()):
            bias = None
        return Linear(values.shape[1], self.rows, self.columns, (Piece(CODES, self.dr, self.dc, values),), bias)


@dataclass(frozen=True, eq=False)
class Pending:
    """``sigmoid`` or ``tanh`` of vectors, until it is known what it is multiplied by; ``elu`` or ``relu`` of vectors on
    more than the grid, until they are cut to it.
    """

    name: str
    of: Joined


@dataclass(frozen=True, eq=False)
class Scores:
    """Products of queries and keys of two positions, or what a softmax over the latter makes of them.

    Attributes:
        width: of a query of one head.
        scale: what products are multiplied by.
        hidden: bool [N, N] by query and key: those that are minus infinity.
        zeroed: those that are zero in place of a product.
        weights: after the softmax; ``kept`` are those that are not set to zero then, ``clean`` says that NaN is zero.
    """

    query: Joined
    key: Joined
    heads: int
    width: int
    scale: float = 1.0
    hidden: Tensor | None = None
    zeroed: Tensor | None = None
    weights: bool = False
    kept: Tensor | None = None
    clean: bool = False


Value = Table | Joined | Pending | Scores


def joined(parts: Sequence[Linear]) -> Joined:
    """Vectors one after the other; neighbouring channels of one vector become one again."""
    found: list[Linear] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and last.origin is not None and part.origin is not None:
            (whole, first), (other, start) = last.origin, part.origin
            if whole is other and first + last.channels == start:
                found[-1] = whole.cut(first, start + part.channels)
                continue
        found.append(part)
    return Joined(tuple(found))
