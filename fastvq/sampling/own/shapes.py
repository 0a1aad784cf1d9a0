"""Views, permutations, cuts, joins and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.base import Held, Values, channels_of, columns_of, rows_of, together
from fastvq.sampling.own.emit import Untraceable
from fastvq.sampling.own.layout import Layout
from fastvq.sampling.own.tensors import Traced, is_given, place
from fastvq.sampling.own.values import Joined, Linear, Pending, Table, Value, joined


class Shapes(Values):
    """Operations that change no number."""

    def _same(self, name: str, args: Any, kwargs: Any) -> Any:
        """What changes no number, or a type alone."""
        x = args[0]
        dtype = kwargs.get("dtype") or x.dtype
        value = self._held(x).value
        if isinstance(value, Table):
            value = value.apply(lambda rows: rows.to(dtype))
        elif not dtype.is_floating_point:
            raise Untraceable(f"it makes {dtype} of features")
        return self._wrap(value, self._held(x).layout, dtype)

    def _view(self, name: str, args: Any, kwargs: Any) -> Any:
        x, sizes = args[0], args[1]
        held = self._held(x)
        if name == "expand":
            if any(n not in (-1, have) for n, have in zip(sizes[-x.ndim :], x.shape, strict=True)):
                raise Untraceable(f"it expands {list(x.shape)} to {list(sizes)}")
            return self._wrap(held.value, ((),) * (len(sizes) - x.ndim) + held.layout, x.dtype)
        found = lay.reshaped(held.layout, list(sizes))
        if found is None:
            raise Untraceable(f"it views {list(x.shape)} as {list(sizes)}, which mixes samples, positions and channels")
        return self._wrap(held.value, found, x.dtype)

    def _permute(self, name: str, args: Any, kwargs: Any) -> Any:
        x = args[0]
        held = self._held(x)
        order = list(range(x.ndim))
        if name == "permute":
            order = [d % x.ndim for d in args[1]]
        else:
            a, b = (0, 1) if name == "t" else (args[1], args[2])
            order[a], order[b] = order[b], order[a]
        index = lay.permuted_channels(held.layout, order)
        value = held.value
        if index is not None:
            if isinstance(value, Table):
                value = value.apply(lambda rows: rows[:, index])
            else:
                value = self._gathered(self._linear(value), index)
        return self._wrap(value, tuple(held.layout[d] for d in order), x.dtype)

    def _gathered(self, x: Joined, index: Sequence[int]) -> Joined:
        one = self.emitter.merged(x)
        matrix = torch.eye(x.channels, device=self.device)[:, list(index)]
        return Joined((self.emitter.convolved([(one, 0, 0, matrix)], None),))

    def _unsqueeze(self, name: str, args: Any, kwargs: Any) -> Any:
        x, held = args[0], self._held(args[0])
        layout = list(held.layout)
        if name == "unsqueeze":
            layout.insert(args[1] % (x.ndim + 1), ())
        else:
            where = args[1] if len(args) > 1 else list(range(x.ndim))
            gone = {d % x.ndim for d in (where if isinstance(where, (list, tuple)) else [where])}
            layout = [dim for d, dim in enumerate(layout) if d not in gone or x.shape[d] != 1]
        return self._wrap(held.value, tuple(layout), x.dtype)

    def _slice(self, name: str, args: Any, kwargs: Any) -> Any:
        x, rest = args[0], [*args[1:], None, None, None, None]
        dim, start, end, step = rest[:4]
        if step not in (None, 1):
            raise Untraceable(f"it takes every {step}th")
        dim = (dim or 0) % x.ndim
        first, last, _ = slice(start, end).indices(x.shape[dim])
        return self._range(x, dim, first, max(first, last))

    def _range(self, x: Traced, dim: int, first: int, last: int) -> Traced:
        held = self._held(x)
        if (first, last) == (0, x.shape[dim]):
            return x
        if first == last:
            raise Untraceable("it takes nothing of a dimension")
        axes = held.layout[dim]
        if not axes:
            return x
        if axes[0].name == "b" and last - first == 1:
            # All samples are alike here; what becomes of it shows whether that is enough.
            return self._wrap(held.value, (*held.layout[:dim], (), *held.layout[dim + 1 :]), x.dtype)
        if len(axes) > 1 or axes[0].name == "b":
            raise Untraceable(f"it takes {first}..{last - 1} of samples or of several dimensions in one")
        name = axes[0].name
        layout = (*held.layout[:dim], lay.only(name, last - first), *held.layout[dim + 1 :])
        if name == "k":
            return self._wrap(self._channels(held, dim, first, last), layout, x.dtype)
        return self._wrap(self._window(held.value, name, first, last - first), layout, x.dtype)

    def _channels(self, held: Held, dim: int, first: int, last: int) -> Value:
        before = lay.channels(held.layout[:dim])
        own, after = lay.size(held.layout[dim]), lay.channels(held.layout[dim + 1 :])
        value = held.value
        if before == 1:
            start, stop = first * after, last * after
            if isinstance(value, Table):
                return value.apply(lambda rows: rows[:, start:stop])
            if isinstance(value, Pending) and not value.name.startswith("gate "):
                return Pending(value.name, value.of.cut(start, stop))
            return self._linear(value).cut(start, stop)
        index = torch.arange(before * own * after).view(before, own, after)[:, first:last].flatten().tolist()
        if isinstance(value, Table):
            return value.apply(lambda rows: rows[:, index])
        return self._gathered(self._linear(value), index)

    def _window(self, value: Value, name: str, first: int, count: int) -> Value:
        top, left = (first, 0) if name == "r" else (0, first)
        rows, columns = (count, columns_of(value)) if name == "r" else (rows_of(value), count)
        if isinstance(value, Table):
            return value.window(top, left, rows, columns, self.grid)
        if isinstance(value, Pending):
            return Pending(value.name, self._seen(value.of, top, left, rows, columns))
        return self._seen(self._linear(value), top, left, rows, columns)

    def _seen(self, x: Joined, top: int, left: int, rows: int, columns: int) -> Joined:
        # What is on the whole grid may be wanted as it is, too.
        return Joined(tuple(part.window(top, left, rows, columns) for part in self._settled(x).parts))

    def _select(self, name: str, args: Any, kwargs: Any) -> Any:
        x, dim, index = args
        dim, index = dim % x.ndim, index % x.shape[dim % x.ndim]
        part = self._range(x, dim, index, index + 1)
        held = self._held(part)
        if held.layout[dim]:
            raise Untraceable("it takes one of several")
        return self._wrap(held.value, held.layout[:dim] + held.layout[dim + 1 :], x.dtype)

    def _split(self, name: str, args: Any, kwargs: Any) -> Any:
        x, sizes = args[0], args[1]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.ndim
        total = x.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - first) for first in range(0, total, sizes)]
        found, first = [], 0
        for count in sizes:
            found.append(self._range(x, dim, first, first + count))
            first += count
        return found

    def _chunk(self, name: str, args: Any, kwargs: Any) -> Any:
        x, count = args[0], args[1]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.ndim
        return self._split(name, (x, -(-x.shape[dim] // count), dim), {})

    def _unbind(self, name: str, args: Any, kwargs: Any) -> Any:
        x = args[0]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.ndim
        return [self._select("select", (x, dim, index), {}) for index in range(x.shape[dim])]

    def _cat(self, name: str, args: Any, kwargs: Any) -> Any:
        tensors = list(args[0])
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        first = next(x for x in tensors if isinstance(x, Traced) and not is_given(x))
        dim %= first.ndim
        like = self._held(first).layout
        if lay.channels(like[:dim]) > 1 or any(axis.name != "k" for axis in like[dim]):
            return self._zeros_beside(tensors, dim)
        counts = [x.shape[dim] for x in tensors]
        values: list[Value] = []
        for x, count in zip(tensors, counts, strict=True):
            layout = (*like[:dim], lay.only("k", count), *like[dim + 1 :])
            if not isinstance(x, Traced) or is_given(x):
                values.append(Joined((self._beside(x, layout, first),)))
            elif self._held(x).layout != layout:
                raise Untraceable(f"it joins {list(x.shape)} with {list(first.shape)}")
            else:
                values.append(self._held(x).value)
        layout = (*like[:dim], lay.only("k", sum(counts)), *like[dim + 1 :])
        tables = [value for value in values if isinstance(value, Table)]
        if len(tables) == len(values) and all(table.like(tables[0]) for table in tables):
            return self._wrap(together(tables, lambda *rows: torch.cat(rows, dim=1)), layout)
        return self._wrap(joined([part for value in values for part in self._linear(value).parts]), layout)

    def _beside(self, x: Any, layout: Layout, like: Traced) -> Linear:
        """What does not depend on codes, to be joined with features."""
        held = Held(self._held(like).value, layout)
        vector = self._vector(x, held)
        if vector is not None:
            return Linear(
                len(vector), rows_of(held.value), columns_of(held.value), (), vector if bool(vector.any()) else None
            )
        return self._static(x, layout, spread=True)

    def _zeros_beside(self, tensors: Sequence[Any], dim: int) -> Any:
        """Rows or columns of zeros before or after, as padding."""
        where = [i for i, x in enumerate(tensors) if isinstance(x, Traced)]
        plain = [x for i, x in enumerate(tensors) if i not in where]
        if len(where) != 1 or is_given(tensors[where[0]]) or any(bool(x.any()) for x in plain):
            raise Untraceable("it joins features along rows, columns or samples")
        x, at = tensors[where[0]], where[0]
        pads = [0] * (2 * (x.ndim - dim))
        pads[-2] = sum(y.shape[dim] for y in tensors[:at])
        pads[-1] = sum(y.shape[dim] for y in tensors[at + 1 :])
        return self._pad("constant_pad_nd", (x, pads), {})

    def _pad(self, name: str, args: Any, kwargs: Any) -> Any:
        x, pads = args[0], list(args[1])
        fill = args[2] if len(args) > 2 else kwargs.get("value", 0)
        held = self._held(x)
        value, layout = held.value, list(held.layout)
        for position, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            dim = x.ndim - 1 - position
            if before == after == 0:
                continue
            names = [axis.name for axis in layout[dim]] or [self._missing(layout, dim, x.ndim)]
            if names == ["k"] and before >= 0 and after >= 0 and fill == 0 and lay.channels(tuple(layout[:dim])) == 1:
                value, layout[dim] = self._more_channels(value, before, after), ()
                layout[dim] = lay.only("k", channels_of(value) // lay.channels(tuple(layout[dim + 1 :])))
                continue
            if names not in (["r"], ["c"]):
                raise Untraceable("it pads samples or channels")
            layout[dim] = lay.only(names[0], x.shape[dim] + before + after)
            value = self._around(value, names[0], before, after, fill)
        return self._wrap(value, tuple(layout), x.dtype)

    def _missing(self, layout: Sequence[Any], dim: int, ndim: int) -> str:
        """What a dimension of size 1 is, by its place among the others."""
        if ndim == 4 and dim >= 2:
            return "r" if dim == 2 else "c"
        if ndim == 3 and dim >= 1:
            return "r" if dim == 1 else "c"
        return "k"

    def _more_channels(self, value: Value, before: int, after: int) -> Value:
        x = self._linear(value)
        nothing = [Linear(n, x.rows, x.columns, (), None) if n else None for n in (before, after)]
        return Joined(tuple(part for part in (nothing[0], *x.parts, nothing[1]) if part is not None))

    def _around(self, value: Value, name: str, before: int, after: int, fill: float) -> Value:
        top, bottom, left, right = (before, after, 0, 0) if name == "r" else (0, 0, before, after)
        if isinstance(value, Table):
            found = self._table_around(value, top, bottom, left, right, fill)
            if found is not None:
                return found
        if isinstance(value, Pending) and (value.name == "sigmoid" or (value.of.rows, value.of.columns) == self.grid):
            value = self._applied(value)
        if fill != 0:
            raise Untraceable(f"it pads features with {fill}, not 0")
        x = value.of if isinstance(value, Pending) else self._linear(value)
        parts = []
        for part in x.parts:
            padded, sure = self.emitter.padded(part, top, bottom, left, right)
            parts.append(padded)
            if not sure:
                self._doubt()
        return Pending(value.name, Joined(tuple(parts))) if isinstance(value, Pending) else Joined(tuple(parts))

    def _doubt(self) -> None:
        """Zeros where something was cut off: right as long as it is cut off again."""
        self.doubts.append(f"zeros where something was cut off, in {place(self._names)}")

    def _table_around(self, value: Table, top: int, bottom: int, left: int, right: int, fill: float) -> Table | None:
        """None if what is outside of the grid would have several values."""
        height, width = self.grid
        found = value.window(-top, -left, value.rows + top + bottom, value.columns + left + right, self.grid)
        outside = value.values.new_full((1, value.channels), fill)
        if found.outside is not None and not torch.equal(found.outside, outside):
            return None
        if (
            (top > 0 and value.dr > 0)
            or (left > 0 and value.dc > 0)
            or (bottom > 0 and value.rows + value.dr < height)
            or (right > 0 and value.columns + value.dc < width)
        ):
            self._doubt()
        inside = 0 <= found.dr <= height - found.rows and 0 <= found.dc <= width - found.columns
        return Table(found.values, None if inside else outside, found.dr, found.dc, found.rows, found.columns)
