"""A network followed operation by operation, and written down as a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastvq.errors import TraceError
from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.emit import Emitter, NotCausal, Untraceable
from fastvq.sampling.own.layout import Layout
from fastvq.sampling.own.tensors import Given, Traced, Tracer, is_given, place
from fastvq.sampling.own.values import Joined, Linear, Pending, Table, Value, joined
from fastvq.sampling.plan import Graph

# So many samples are traced; one more than any size that broadcasts.
BATCH = 2


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


class Recorder(Tracer):
    """Follows a network and writes it into a graph.

    Args:
        names: of its modules, by identity.

    Attributes:
        meetings: the static operations that depend on condition or label.
    """

    def __init__(
        self, graph: Graph, grid: tuple[int, int], num_codes: int, device: torch.device, names: dict[int, str]
    ) -> None:
        super().__init__(device)
        self.grid, self.num_codes, self._names = grid, num_codes, names
        self.emitter = Emitter(graph, grid, num_codes, device)
        self.meetings: list[Meeting] = []
        self._statics: dict[tuple[Given, Layout, bool], Linear] = {}

    def codes(self) -> Traced:
        height, width = self.grid
        values = torch.arange(self.num_codes, device=self.device)[:, None]
        layout = (lay.only("b", BATCH), lay.only("r", height), lay.only("c", width))
        return self._wrap(Table(values, None, 0, 0, height, width), layout)

    def output(self, logits: Any) -> int:
        """The operation that gives logits.

        Raises:
            TraceError: they are none of [B, K, H, W] that depend on the codes.
        """
        height, width = self.grid
        wanted = (lay.only("b", BATCH), lay.only("k", self.num_codes), lay.only("r", height), lay.only("c", width))
        if not isinstance(logits, Traced) or is_given(logits):
            raise TraceError("module: what it returns does not depend on the codes")
        held = self._held(logits)
        if held.layout != wanted:
            raise TraceError(
                f"module: expected logits [B, {self.num_codes}, {height}, {width}], got {self._shape_words(held)}"
            )
        try:
            x = self.emitter.merged(self._linear(held.value))
            one = self.emitter.alone(x).alone
            assert one is not None
            if (one.dr, one.dc) != (0, 0) or self.emitter.graph.ops[one.source].kind != "affine":
                one = self.emitter.alone(self.emitter.times_one(x)).alone
                assert one is not None
            return one.source
        except Untraceable as error:
            raise TraceError(f"module: its logits have no plan: {error}") from error

    def _shape_words(self, held: Held) -> str:
        return f"{list(lay.shape(held.layout))}"

    # Every operation on codes comes through here.

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        self.number(args, kwargs)
        try:
            handler = HANDLERS.get(name)
            if handler is not None:
                return handler(self, name, args, kwargs)
            if torch.Tag.pointwise in func.tags or name in _BY_VALUE:
                return self._by_value(func, name, args, kwargs)
            raise Untraceable(_REASONS.get(name, "no operation of a plan does this"))
        except Untraceable as error:
            raise self._error(name, error) from error

    def whole(self, name: str, args: Any, kwargs: Any) -> Any:
        self.number(args, kwargs)
        try:
            return WHOLE_HANDLERS[name](self, name, args, kwargs)
        except Untraceable as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: Untraceable) -> TraceError:
        where = place(self._names)
        at = f" in {where}" if where else ""
        kind = "leak" if isinstance(error, NotCausal) else "operation"
        return TraceError(f"module: cannot be traced: {kind} at {name.rstrip('_')}{at}: {error}")

    # Values and tensors.

    def _held(self, x: Traced) -> Held:
        held: Held = x.value
        return held

    def _wrap(self, value: Value, layout: Layout, dtype: torch.dtype | None = None) -> Traced:
        if dtype is None:
            dtype = value.values.dtype if isinstance(value, Table) else torch.get_default_dtype()
        return Traced(self, Held(value, layout), lay.shape(layout), dtype)

    def _linear(self, value: Value) -> Joined:
        if isinstance(value, Table):
            return Joined((value.linear(),))
        if isinstance(value, Pending):
            return self._applied(value)
        return value

    def _applied(self, value: Pending) -> Joined:
        """An activation, or a function that is no operation of its own, as a gate whose other half is constant."""
        x = value.of
        if value.name in _DELAYED:
            return Joined(tuple(self.emitter.elementwise("activation", value.name, part) for part in x.parts))
        ones = torch.full((x.channels,), 1.0 if value.name == "sigmoid" else _OPEN, device=self.device)
        constant = Linear(x.channels, x.rows, x.columns, (), ones)
        sides = [constant, *x.parts] if value.name == "sigmoid" else [*x.parts, constant]
        variant = "glu" if value.name == "sigmoid" else "tanh"
        return Joined((self.emitter.elementwise("gate", variant, self.emitter.merged(Joined(tuple(sides)))),))

    def _vectors(self, x: Traced) -> tuple[Joined, Layout]:
        held = self._held(x)
        return self._linear(held.value), held.layout

    # Layout.

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
        x, dim, start, end, step = (*args, *(None,) * (5 - len(args)))
        step = kwargs.get("step", step)
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
        if len(axes) > 1 or axes[0].name == "b":
            raise Untraceable(f"it takes {first}..{last - 1} of samples or of several dimensions in one")
        name = axes[0].name
        layout = (*held.layout[:dim], lay.only(name, last - first), *held.layout[dim + 1 :])
        if name == "k":
            return self._wrap(self._channels(held, dim, first, last), layout, x.dtype)
        low, high = ((first, 0), (last, x.shape[dim])) if name == "r" else ((0, first), (x.shape[dim], last))
        return self._wrap(self._window(held.value, name, first, last - first), layout, x.dtype)

    def _channels(self, held: Held, dim: int, first: int, last: int) -> Value:
        before = lay.channels(held.layout[:dim])
        own, after = lay.size(held.layout[dim]), lay.channels(held.layout[dim + 1 :])
        value = held.value
        if before == 1:
            start, stop = first * after, last * after
            if isinstance(value, Table):
                return value.apply(lambda rows: rows[:, start:stop])
            if isinstance(value, Pending):
                return Pending(value.name, value.of.cut(start, stop))
            return value.cut(start, stop)
        index = torch.arange(before * own * after).view(before, own, after)[:, first:last].flatten().tolist()
        if isinstance(value, Table):
            return value.apply(lambda rows: rows[:, index])
        return self._gathered(self._linear(value), index)

    def _window(self, value: Value, name: str, first: int, count: int) -> Value:
        top, left = (first, 0) if name == "r" else (0, first)
        rows, columns = (count, _columns(value)) if name == "r" else (_rows(value), count)
        if isinstance(value, Table):
            return value.window(top, left, rows, columns, self.grid)
        if isinstance(value, Pending):
            return Pending(value.name, self._seen(value.of, top, left, rows, columns))
        return self._seen(value, top, left, rows, columns)

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
            return self._wrap(_together(tables, lambda *rows: torch.cat(rows, dim=1)), layout)
        return self._wrap(joined([part for value in values for part in self._linear(value).parts]), layout)

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
                layout[dim] = lay.only("k", _channels_of(value) // lay.channels(tuple(layout[dim + 1 :])))
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
            return self._table_around(value, top, bottom, left, right, fill)
        if isinstance(value, Pending) and value.name == "sigmoid":
            value = self._applied(value)
        if fill != 0:
            raise Untraceable(f"it pads features with {fill}, not 0")
        x = value.of if isinstance(value, Pending) else value
        padded = Joined(tuple(self.emitter.padded(part, top, bottom, left, right) for part in x.parts))
        return Pending(value.name, padded) if isinstance(value, Pending) else padded

    def _table_around(self, value: Table, top: int, bottom: int, left: int, right: int, fill: float) -> Table:
        height, width = self.grid
        found = value.window(-top, -left, value.rows + top + bottom, value.columns + left + right, self.grid)
        exposed = (
            (top > 0 and value.dr > 0)
            or (left > 0 and value.dc > 0)
            or (bottom > 0 and value.rows + value.dr < height)
            or (right > 0 and value.columns + value.dc < width)
        )
        outside = value.values.new_full((1, value.channels), fill)
        if exposed or (found.outside is not None and not torch.equal(found.outside, outside)):
            raise Untraceable("it pads where something was cut off, or with several values")
        inside = 0 <= found.dr <= height - found.rows and 0 <= found.dc <= width - found.columns
        return Table(found.values, None if inside else outside, found.dr, found.dc, found.rows, found.columns)

    # Products.

    def _convolution(self, name: str, args: Any, kwargs: Any) -> Any:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        held = self._held(x) if isinstance(x, Traced) and not is_given(x) else None
        if held is None or isinstance(weight, Traced):
            raise Untraceable("its weights depend on the codes")
        if x.ndim != 4 or transposed or any(s != 1 for s in stride):
            kind = "transposed" if transposed else f"of {x.ndim - 2} dimensions with stride {list(stride)}"
            raise Untraceable(f"a convolution that is {kind}")
        value: Value = held.value
        for axis, count in zip("rc", padding, strict=True):
            if count:
                value = self._around(value, axis, count, count, 0)
        weight = _ungrouped(weight.float(), groups)  # [C_out, C_in, kh, kw]
        taps = [
            (a, b) for a in range(weight.shape[2]) for b in range(weight.shape[3]) if bool(weight[:, :, a, b].any())
        ] or [(0, 0)]
        rows = _rows(value) - (weight.shape[2] - 1) * dilation[0]
        columns = _columns(value) - (weight.shape[3] - 1) * dilation[1]
        matrices = [(a * dilation[0], b * dilation[1], weight[:, :, a, b].t()) for a, b in taps]
        found = self._products(value, matrices, None if bias is None else bias.float(), rows, columns)
        layout = (held.layout[0], lay.only("k", len(weight)), lay.only("r", rows), lay.only("c", columns))
        return self._wrap(found, layout, x.dtype)

    def _products(
        self, value: Value, matrices: Sequence[tuple[int, int, Tensor]], bias: Tensor | None, rows: int, columns: int
    ) -> Value:
        """The sum over taps (dr, dc) of what is there times [C_in, C_out]."""
        if isinstance(value, Table):
            if len(matrices) == 1 and (rows, columns) == (value.rows, value.columns):
                weight = matrices[0][2]
                return value.apply(lambda x: x.float() @ weight if bias is None else x.float() @ weight + bias)
            sums = [value.linear(weight).window(dr, dc, rows, columns) for dr, dc, weight in matrices]
            total = sums[0]
            for one in sums[1:]:
                total = total.plus(one)
            return Joined((total if bias is None else total.shifted_by(bias),))
        x = self._linear(value)
        parts, first = [], 0
        for part in x.parts:
            for dr, dc, weight in matrices:
                own = weight[first : first + part.channels]
                if len(x.parts) == 1 or bool(own.any()):
                    parts.append((part, dr, dc, own))
            first += part.channels
        if not parts:
            parts = [(x.parts[0], 0, 0, matrices[0][2][: x.parts[0].channels])]
        return Joined((self.emitter.convolved(parts, bias).window(0, 0, rows, columns),))

    def _mm(self, name: str, args: Any, kwargs: Any) -> Any:
        bias, (x, weight) = (None, args) if name == "mm" else (args[0], args[1:3])
        if not isinstance(x, Traced) or isinstance(weight, Traced) or isinstance(bias, Traced):
            raise Untraceable("a product of features with each other")
        held = self._held(x)
        if any(axis.name != "k" for axis in held.layout[1]) or lay.channels(held.layout[:1]) > 1:
            raise Untraceable("a product along positions")
        if name == "addmm" and (kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or bias.ndim != 1):
            raise Untraceable("a product with factors of its own")
        value = held.value
        bias = None if bias is None else bias.float().expand(weight.shape[1])
        found = self._products(value, [(0, 0, weight.float())], bias, _rows(value), _columns(value))
        return self._wrap(found, (held.layout[0], lay.only("k", weight.shape[1])), x.dtype)

    def _embedding(self, name: str, args: Any, kwargs: Any) -> Any:
        weight, index = args[0], args[1]
        if isinstance(weight, Traced):
            raise Untraceable("its vectors depend on the codes")
        held = self._held(index)
        table = held.value
        if not isinstance(table, Table) or table.channels != 1:
            raise Untraceable("it looks up something else than a code")
        found = table.apply(lambda rows: _looked_up(weight, rows[:, 0]))
        return self._wrap(found, (*held.layout, lay.only("k", weight.shape[1])))

    def _one_hot(self, name: str, args: Any, kwargs: Any) -> Any:
        count = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        count = self.num_codes if count == -1 else count
        table = self._held(args[0]).value
        if not isinstance(table, Table) or table.channels != 1:
            raise Untraceable("it takes something else than codes")
        eye = torch.eye(count, dtype=torch.int64, device=self.device)
        found = table.apply(lambda rows: _looked_up(eye, rows[:, 0]))
        return self._wrap(found, (*self._held(args[0]).layout, lay.only("k", count)))

    def _batch_norm(self, name: str, args: Any, kwargs: Any) -> Any:
        x, weight, bias, mean, variance, training = args[:6]
        eps = args[7]
        if training or mean is None or variance is None:
            raise Untraceable("a batch norm that uses statistics of the batch")
        scale = torch.rsqrt(variance.double() + eps) * (1 if weight is None else weight.double())
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        held = self._held(x)
        if held.layout[1:2] != (lay.only("k", len(mean)),):
            raise Untraceable("its channels are not in dimension 1")
        found = self._moved(held.value, scale.float(), shift.float())
        empty = torch.empty(0)
        return self._wrap(found, held.layout, x.dtype), empty, empty

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

    # Element by element.

    def _by_value(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Any function of one code's vector alone is known for every code."""
        held = self._held(args[0]) if isinstance(args[0], Traced) and not is_given(args[0]) else None
        if held is None or not isinstance(held.value, Table) or _tensors(args[1:], kwargs):
            raise Untraceable(_REASONS.get(name, "no operation of a plan does this"))
        plain = getattr(torch.ops.aten, name.rstrip("_")) if name.endswith("_") else func
        return self._result(name, args, held.value.apply(lambda x: plain(x, *args[1:], **kwargs)), held.layout)

    def _result(self, name: str, args: Any, value: Value, layout: Layout) -> Traced:
        """A new tensor, or the first argument changed where the operation works in place."""
        if name.endswith("_") and isinstance(args[0], Traced):
            args[0].value = Held(value, layout)
            return args[0]
        return self._wrap(value, layout)

    def _function(self, name: str, args: Any, kwargs: Any) -> Any:
        plain, held = name.rstrip("_"), self._held(args[0])
        value = held.value
        if isinstance(value, Table):
            return self._by_value(getattr(torch.ops.aten, plain), name, args, kwargs)
        if plain in ("sigmoid", "tanh"):
            return self._result(name, args, Pending(plain, self._linear(value)), held.layout)
        x = self._linear(value)
        if plain == "elu" and any(factor != 1 for factor in [*args[1:], *kwargs.values()]):
            raise Untraceable("only an ELU with factors of 1 is an operation of a plan")
        if plain in _DELAYED and (x.rows > self.grid[0] or x.columns > self.grid[1]):
            return self._result(name, args, Pending(plain, x), held.layout)
        if plain == "silu":
            one = self.emitter.merged(x)
            twice = self.emitter.merged(Joined((one, one)))
            return self._result(name, args, Joined((self.emitter.elementwise("gate", "glu", twice),)), held.layout)
        if plain == "leaky_relu":
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            parts = [self.emitter.alone(part) for part in x.parts]
            return self._result(name, args, Joined(tuple(self._leaky(part, slope) for part in parts)), held.layout)
        if plain == "elu" and (whole := self._concatenated(x)) is not None:
            found = self.emitter.elementwise("activation", "concat_elu", whole)
            return self._result(name, args, Joined((found,)), held.layout)
        found = Joined(tuple(self.emitter.elementwise("activation", plain, part) for part in x.parts))
        return self._result(name, args, found, held.layout)

    def _leaky(self, x: Linear, slope: float) -> Linear:
        positive = self.emitter.elementwise("activation", "relu", x)
        share = torch.full((x.channels,), slope, device=self.device)
        return positive.scaled(1 - share, self.emitter.dense).plus(x.scaled(share, self.emitter.dense))

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

    def _glu(self, name: str, args: Any, kwargs: Any) -> Any:
        x = args[0]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.ndim
        one, two = self._split("split", (x, x.shape[dim] // 2, dim), {})
        gate = self._function("sigmoid", (two,), {})
        return self._mul("mul", (one, gate), {})

    def _add(self, name: str, args: Any, kwargs: Any) -> Any:
        a, b = args[0], args[1]
        factor = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        sign = -factor if name.startswith("sub") else factor
        if name.startswith("rsub"):
            a, b, sign = b, a, -factor
        if not isinstance(a, Traced) or is_given(a):
            if isinstance(b, Traced) and not is_given(b):
                b = self._mul("mul", (b, sign), {}) if sign != 1 else b
                return self._plus(name, b, a, args)
            raise Untraceable("it changes something that does not depend on codes")
        if isinstance(b, Traced) and not is_given(b):
            b = self._mul("mul", (b, sign), {}) if sign != 1 else b
            return self._sum(name, a, b, args)
        return self._plus(name, a, b * sign if sign != 1 else b, args)

    def _sum(self, name: str, a: Traced, b: Traced, args: Any) -> Any:
        one, other = self._held(a), self._held(b)
        if one.layout != other.layout:
            raise Untraceable(f"it adds {list(a.shape)} and {list(b.shape)}")
        if isinstance(one.value, Table) and isinstance(other.value, Table) and one.value.like(other.value):
            return self._result(name, args, _together([one.value, other.value], torch.add), one.layout)
        return self._result(name, args, self._summed(self._linear(one.value), self._linear(other.value)), one.layout)

    def _summed(self, x: Joined, y: Joined) -> Joined:
        bounds = sorted({*x.bounds(), *y.bounds()})
        pairs = [(x.cut(a, b).parts[0], y.cut(a, b).parts[0]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        # What is an operation already is not worked out again.
        return Joined(tuple(self.emitter.ready(a).plus(self.emitter.ready(b)) for a, b in pairs))

    def _plus(self, name: str, x: Traced, other: Any, args: Any) -> Any:
        """Features and what does not depend on codes."""
        held = self._held(x)
        vector = self._vector(other, held)
        if vector is not None:
            return self._result(name, args, self._moved(held.value, None, vector), held.layout)
        static = self._static(other, held.layout, spread=False)
        return self._result(name, args, self._summed(self._linear(held.value), Joined((static,))), held.layout)

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

    def _beside(self, x: Any, layout: Layout, like: Traced) -> Linear:
        """What does not depend on codes, to be joined with features."""
        held = Held(self._held(like).value, layout)
        vector = self._vector(x, held)
        if vector is not None:
            return Linear(
                len(vector), _rows(held.value), _columns(held.value), (), vector if bool(vector.any()) else None
            )
        return self._static(x, layout, spread=True)

    def _mul(self, name: str, args: Any, kwargs: Any) -> Any:
        a, b = args[0], args[1]
        if not isinstance(a, Traced) or is_given(a):
            a, b = b, a
        held = self._held(a)
        if isinstance(b, Traced) and not is_given(b):
            return self._result(name, args, self._multiplied(held, self._held(b)), held.layout)
        vector = self._vector(b, held)
        if vector is None:
            raise Untraceable("it multiplies features by what differs between samples or positions")
        if name.startswith("div"):
            if b is not args[1]:
                raise Untraceable("it divides by features")
            vector = 1 / vector
        if isinstance(held.value, Table):
            return self._result(name, args, held.value.apply(lambda x: x * vector.to(_kind(x))), held.layout)
        return self._result(name, args, self._moved(held.value, vector, None), held.layout)

    def _neg(self, name: str, args: Any, kwargs: Any) -> Any:
        held = self._held(args[0])
        if isinstance(held.value, Joined):
            # It will be wanted as it is, too.
            args[0].value = Held(self._settled(held.value), held.layout)
        return self._mul("mul", (args[0], -1), {})

    def _settled(self, x: Joined) -> Joined:
        whole = (x.rows, x.columns) == self.grid
        return Joined(tuple(self.emitter.settled(part) for part in x.parts)) if whole else x

    def _multiplied(self, one: Held, other: Held) -> Value:
        if one.layout != other.layout:
            raise Untraceable("it multiplies features of different shapes")
        a, b = one.value, other.value
        if isinstance(a, Table) and isinstance(b, Table) and a.like(b):
            return _together([a, b], torch.mul)
        if isinstance(a, Pending) and (a.name == "sigmoid" or not isinstance(b, Pending)):
            a, b = b, a
        if not isinstance(b, Pending) or b.name != "sigmoid":
            raise Untraceable(
                "it multiplies features by each other; a plan has a * sigmoid(b) and tanh(a) * sigmoid(b)"
            )
        if isinstance(a, Pending) and a.name == "tanh":
            return self._gated(a.of, b.of, "tanh")
        return self._gated(self._linear(a), b.of, "glu")

    def _gated(self, content: Joined, gate: Joined, variant: str) -> Joined:
        both = joined([*content.parts, *gate.parts])
        return Joined((self.emitter.elementwise("gate", variant, self.emitter.merged(both)),))


# Functions of features on more than the grid wait until these are cut.
_DELAYED = ("elu", "relu")
# A sigmoid of it is 1 in float32.
_OPEN = 30.0


def _rows(value: Value) -> int:
    return value.of.rows if isinstance(value, Pending) else value.rows


def _columns(value: Value) -> int:
    return value.of.columns if isinstance(value, Pending) else value.columns


def _channels_of(value: Value) -> int:
    return value.of.channels if isinstance(value, Pending) else value.channels


def _kind(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else torch.float32


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    integer = not x.dtype.is_floating_point
    found = x.float() if integer else x
    found = found if scale is None else found * scale
    found = found if shift is None else found + shift
    # Whole numbers stay such: an offset of codes is looked up.
    return found.to(x.dtype) if integer and torch.equal(found, found.round()) else found


def _together(tables: Sequence[Table], function: Callable[..., Tensor]) -> Table:
    first = tables[0]
    outside = None
    if any(table.outside is not None for table in tables):
        outside = function(*[table.values[:1] if table.outside is None else table.outside for table in tables])
    values = function(*[table.values for table in tables])
    return Table(values, outside, first.dr, first.dc, first.rows, first.columns)


def _looked_up(vectors: Tensor, index: Tensor) -> Tensor:
    if bool((index < 0).any()) or bool((index >= len(vectors)).any()):
        raise Untraceable(f"a code or what it is padded with is not in 0..{len(vectors) - 1}")
    return vectors[index.long()]


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weights of one convolution in place of several side by side."""
    if groups == 1:
        return weight
    out, own = weight.shape[:2]
    full = weight.new_zeros(out, own * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        full[rows, group * own : (group + 1) * own] = weight[rows]
    return full


def _is_everywhere(real: Tensor, layout: Layout) -> bool:
    """Whether a tensor is the same at all positions by how it lies, whatever its numbers."""
    dims = layout[len(layout) - real.ndim :]
    sized = zip(dims, real.shape, real.stride(), strict=True)
    return all(count == 1 or stride == 0 for dim, count, stride in sized if any(axis.name in "rc" for axis in dim))


def _tensors(*args: Any) -> list[Tensor]:
    return [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]


_BY_VALUE = {"log_softmax", "_softmax"}
_REASONS = {
    "_local_scalar_dense": "the network looks at the value of a code or feature, to decide something by it",
    "is_nonzero": "the network looks at the value of a code or feature, to decide something by it",
    "_softmax": "a softmax of features; a plan has attention over earlier positions",
    "native_layer_norm": "a norm over channels, which no operation of a plan does",
    "native_group_norm": "a norm over positions and channels, which no operation of a plan does",
    "gelu": "no operation of a plan does this; ELU, ReLU, leaky ReLU, SiLU, tanh and sigmoid are there",
}
_SAME = ("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "view_as", "dropout")
_R = Recorder
HANDLERS: dict[str, Callable[[Recorder, str, Any, Any], Any]] = {
    **dict.fromkeys(_SAME, _R._same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "expand", "_reshape_alias"), _R._view),
    **dict.fromkeys(("permute", "transpose", "t"), _R._permute),
    **dict.fromkeys(("unsqueeze", "squeeze"), _R._unsqueeze),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _R._split),
    **dict.fromkeys(("sigmoid", "tanh", "relu", "elu", "leaky_relu", "silu"), _R._function),
    **dict.fromkeys(("sigmoid_", "tanh_", "relu_", "elu_", "leaky_relu_", "silu_"), _R._function),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _R._add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _R._mul),
    "neg": _R._neg,
    "slice": _R._slice,
    "select": _R._select,
    "chunk": _R._chunk,
    "unbind": _R._unbind,
    "cat": _R._cat,
    "constant_pad_nd": _R._pad,
    "convolution": _R._convolution,
    "mm": _R._mm,
    "addmm": _R._mm,
    "embedding": _R._embedding,
    "native_batch_norm": _R._batch_norm,
    "cudnn_batch_norm": _R._batch_norm,
    "glu": _R._glu,
}
WHOLE_HANDLERS: dict[str, Callable[[Recorder, str, Any, Any], Any]] = {"one_hot": _R._one_hot}
