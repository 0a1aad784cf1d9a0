"""What following a network begins with: values, how tensors hold them, and what does not depend on codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.emit import Emitter, Untraceable
from fastvq.sampling.own.layout import Layout
from fastvq.sampling.own.tensors import Given, Traced, Tracer, is_given
from fastvq.sampling.own.values import Joined, Linear, Pending, Scores, Table, Value
from fastvq.sampling.plan import Graph

# So many samples are traced; one more than any size that broadcasts.
BATCH = 2
# A sigmoid of it is 1 in float32.
_OPEN = 30.0


@dataclass(frozen=True)
class Meeting:
    """What becomes a static operation: which of the tensors that met codes, and its layout there.

    Attributes:
        everywhere: it is the same at all positions.
    """

    name: str
    number: int
    layout: Layout
    everywhere: bool

    def of(self, met: Sequence[Tensor], batch: int) -> Tensor:
        """Float32 [B, C, H or 1, W or 1] of what met the codes of so many samples."""
        found = lay.canonical(met[self.number], lay.with_batch(self.layout, batch)).float()
        return (found[:, :, :1, :1] if self.everywhere else found).contiguous()


@dataclass(frozen=True)
class Held:
    """A value and how a tensor holds it."""

    value: Value
    layout: Layout


class Values(Tracer):
    """Keeps what tensors are, and what meets them.

    Args:
        place: a tensor of the type and on the device of features.
        names: of its modules, by identity.

    Attributes:
        meetings: the static operations that depend on condition or label.
        doubts: what may be wrong, if the plan turns out to be.
        normalised: logits are those of a plan up to what is the same for all codes.
    """

    def __init__(self, grid: tuple[int, int], num_codes: int, place: Tensor, names: dict[int, str]) -> None:
        super().__init__(place.device)
        self.dtype = place.dtype
        self.grid, self.num_codes, self._names = grid, num_codes, names
        self.emitter = Emitter(Graph(spatial_context=False), grid, num_codes, place.device)
        self.meetings: list[Meeting] = []
        self.doubts: list[str] = []
        self.normalised = False
        self._statics: dict[tuple[Given, Layout, bool], Linear] = {}

    def _held(self, x: Traced) -> Held:
        held: Held = x.value
        return held

    def _wrap(self, value: Value, layout: Layout, dtype: torch.dtype | None = None) -> Traced:
        if dtype is None:
            numbers = isinstance(value, Table) and not value.values.is_floating_point()
            dtype = value.values.dtype if isinstance(value, Table) and numbers else self.dtype
        return Traced(self, Held(value, layout), lay.shape(layout), dtype)

    def _result(self, name: str, args: Any, value: Value, layout: Layout) -> Traced:
        """A new tensor, or the first argument changed where the operation works in place."""
        if name.endswith("_") and isinstance(args[0], Traced):
            args[0].value = Held(value, layout)
            return args[0]
        return self._wrap(value, layout)

    def _linear(self, value: Value) -> Joined:
        if isinstance(value, Table):
            return Joined((value.linear(),))
        if isinstance(value, Pending):
            return self._applied(value)
        if isinstance(value, Scores):
            raise Untraceable("it does something to attention's scores or weights that a plan does not have")
        return value

    def _applied(self, value: Pending) -> Joined:
        """Its operations, now that it is known where it is wanted."""
        x = value.of
        if value.name in ("relu", "elu"):
            whole = self._concatenated(x) if value.name == "elu" else None
            if whole is not None:
                return Joined((self.emitter.elementwise("activation", "concat_elu", whole),))
            return Joined(tuple(self.emitter.elementwise("activation", value.name, part) for part in x.parts))
        if value.name.startswith("gate "):
            return Joined((self.emitter.elementwise("gate", value.name[5:], self.emitter.merged(x)),))
        # A function that is no operation of its own is a gate whose other half is constant.
        ones = torch.full((x.channels,), 1.0 if value.name == "sigmoid" else _OPEN, device=self.device)
        constant = Linear(x.channels, x.rows, x.columns, (), ones)
        sides = [constant, *x.parts] if value.name == "sigmoid" else [*x.parts, constant]
        variant = "glu" if value.name == "sigmoid" else "tanh"
        return Joined((self.emitter.elementwise("gate", variant, self.emitter.merged(Joined(tuple(sides)))),))

    def _once_cut(self, value: Pending) -> Value:
        """A function at once, unless it is on more places than the grid has, which will be cut off."""
        larger = value.of.rows > self.grid[0] or value.of.columns > self.grid[1]
        return value if larger else self._applied(value)

    def _concatenated(self, x: Joined) -> Linear | None:
        """The operation x of [x, -x]."""
        if len(x.parts) != 2:
            return None
        one, other = x.parts[0].alone, x.parts[1]
        if one is None or len(other.pieces) != 1 or other.bias is not None:
            return None
        piece = other.pieces[0]
        same = (piece.source, piece.dr, piece.dc) == (one.source, one.dr, one.dc)
        if same and torch.equal(self.emitter.dense(piece), -self.emitter.dense(one)):
            return self.emitter.alone(x.parts[0])
        return None

    def _settled(self, x: Joined) -> Joined:
        whole = (x.rows, x.columns) == self.grid
        return Joined(tuple(self.emitter.settled(part) for part in x.parts)) if whole else x

    def _moved(self, value: Value, scale: Tensor | None, shift: Tensor | None) -> Value:
        """Vectors times one, plus one: [C] each."""
        if isinstance(value, Table):
            return value.apply(lambda x: _affine(x, scale, shift))
        x, found, first = self._linear(value), [], 0
        for part in x.parts:
            own = slice(first, first + part.channels)
            if scale is not None and not bool((scale[own] == 1).all()):
                part = part.scaled(scale[own], self.emitter.dense)
            found.append(part if shift is None or not bool(shift[own].any()) else part.shifted_by(shift[own]))
            first = own.stop
        return Joined(tuple(found))

    def _vector(self, x: Any, held: Held) -> Tensor | None:
        """A constant that is the same for all samples and positions: [C], or None."""
        if is_given(x):
            return None
        x = torch.as_tensor(x, device=self.device)
        if x.ndim > len(held.layout) or torch.broadcast_shapes(x.shape, lay.shape(held.layout)) != lay.shape(
            held.layout
        ):
            raise Untraceable(f"it combines {list(lay.shape(held.layout))} with a constant {list(x.shape)}")
        full = lay.canonical(x.to(torch.float32) if x.dtype != torch.float64 else x.float(), held.layout)
        first = full[:1, :, :1, :1]
        return first.flatten() if bool((full == first).all()) else None

    def _static(self, x: Any, layout: Layout, *, spread: bool) -> Linear:
        """What does not depend on codes as a static operation.

        Args:
            spread: over all positions, whether it differs between them or not.
        """
        rows, columns = (math.prod(axis.size for axis in lay.axes(layout, name)) for name in "rc")
        if (rows, columns) != self.grid:
            raise Untraceable(f"what does not depend on codes meets {rows} x {columns} positions, not the whole grid")
        if not is_given(x):
            return self.emitter.constant(lay.canonical(torch.as_tensor(x, device=self.device), layout)[:1].float())
        given: Given = x.value
        key = (given, layout, spread)
        if key in self._statics:
            return self._statics[key]
        everywhere = not spread and _is_everywhere(given.real, layout)
        name = f"{'label' if everywhere else 'context'}.{len(self.meetings)}"
        self.meetings.append(Meeting(name, given.number, layout, everywhere))
        self._statics[key] = self.emitter.static(name, lay.channels(layout))
        return self._statics[key]


def _vectors(value: Value) -> Joined | Table:
    assert not isinstance(value, Scores)
    return value.of if isinstance(value, Pending) else value


def rows_of(value: Value) -> int:
    return _vectors(value).rows


def columns_of(value: Value) -> int:
    return _vectors(value).columns


def channels_of(value: Value) -> int:
    return _vectors(value).channels


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    integer = not x.dtype.is_floating_point
    found = x.float() if integer else x
    found = found if scale is None else found * scale
    found = found if shift is None else found + shift
    # Whole numbers stay such: an offset of codes is looked up.
    return found.to(x.dtype) if integer and torch.equal(found, found.round()) else found


def together(tables: Sequence[Table], function: Callable[..., Tensor]) -> Table:
    first = tables[0]
    outside = None
    if any(table.outside is not None for table in tables):
        outside = function(*[table.values[:1] if table.outside is None else table.outside for table in tables])
    values = function(*[table.values for table in tables])
    return Table(values, outside, first.dr, first.dc, first.rows, first.columns)


def _is_everywhere(real: Tensor, layout: Layout) -> bool:
    """Whether a tensor is the same at all positions by how it lies, whatever its numbers."""
    dims = layout[len(layout) - real.ndim :]
    sized = zip(dims, real.shape, real.stride(), strict=True)
    return all(count == 1 or stride == 0 for dim, count, stride in sized if any(axis.name in "rc" for axis in dim))
