"""Sums of pieces as operations of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.sampling.own.values import CODES, ONES, Joined, Linear, Piece
from fastvq.sampling.plan import Graph, Tap, Term
from fastvq.sampling.plan.evaluate import shifted
from fastvq.sampling.plan.form import Op

# A score that no softmax counts beside another one, for heads of any width.
_HIDDEN = -1e5


class Untraceable(Exception):
    """Why something cannot be an operation of a plan."""


class NotCausal(Untraceable):
    """It reads what is not known yet."""


class Emitter:
    """Writes operations into a graph, each once.

    Args:
        grid: rows and columns.

    Attributes:
        constants: values of static operations that do not depend on condition or label, by name.
    """

    def __init__(self, graph: Graph, grid: tuple[int, int], num_codes: int, device: torch.device) -> None:
        self.graph, self.grid, self.num_codes, self.device = graph, grid, num_codes, device
        self.constants: dict[str, Tensor] = {}
        self._known: set[int] = set()  # operations that read rows above and statics alone
        self._made: dict[object, int] = {}
        self._kept: list[object] = []  # what keys are made of stays alive

    def static(self, name: str, channels: int) -> Linear:
        """What is known beforehand, on the whole grid."""
        op = self.graph.static(name, channels)
        self._known.add(op)
        return self._whole(op)

    def constant(self, values: Tensor) -> Linear:
        """What is always the same, float32 [1, C, H, W]."""
        for name, known in self.constants.items():
            if torch.equal(known, values):
                return self._whole(self._made[name])
        name = f"background.{len(self.constants)}"
        self.constants[name] = values.contiguous()
        found = self.static(name, values.shape[1])
        self._made[name] = found.pieces[0].source
        return found

    def _whole(self, op: int, dr: int = 0, dc: int = 0, rows: int | None = None, columns: int | None = None) -> Linear:
        channels = self._op(op).channels
        height, width = self.grid
        piece = Piece(op, dr, dc, (0, channels))
        return Linear(channels, height if rows is None else rows, width if columns is None else columns, (piece,))

    def _op(self, index: int) -> Op:
        return self.graph.ops[index]

    def dense(self, piece: Piece) -> Tensor:
        """The weights of a piece as a matrix."""
        if isinstance(piece.weight, Tensor):
            return piece.weight
        start, stop = piece.weight
        return torch.eye(self._op(piece.source).channels, device=self.device)[:, start:stop]

    def alone(self, x: Linear) -> Linear:
        """The same as one operation, wherever it is read from."""
        piece = x.alone
        if piece is not None and piece.weight == (0, self._op(piece.source).channels):
            return x
        top, left = self._place(x)
        op = self._emit(x.window(-top, -left, *self.grid))
        return self._whole(op, top, left, x.rows, x.columns)

    def settled(self, x: Linear) -> Linear:
        """The same as one operation, unless that would read what is not known there, or be more than the grid."""
        if x.rows > self.grid[0] or x.columns > self.grid[1]:
            return x
        try:
            return self.alone(x)
        except NotCausal:
            return x

    def ready(self, x: Linear) -> Linear:
        """The same, as an operation if it has been written as one."""
        return self.alone(x) if (x.rows, x.columns) == self.grid and _key(x) in self._made else x

    def _place(self, x: Linear) -> tuple[int, int]:
        """Which place of the grid an operation has that is seen on a window from the first place on."""
        found = []
        for extent, whole, name, reach in zip(
            (x.rows, x.columns),
            self.grid,
            ("rows", "columns"),
            (max((p.dr for p in x.pieces), default=0), max((p.dc for p in x.pieces), default=0)),
            strict=True,
        ):
            if extent > whole:
                raise Untraceable(f"it is used on {extent} {name}, before it is cut to the grid's {whole}")
            found.append(min(max(0, reach), whole - extent))
        return found[0], found[1]

    def merged(self, x: Joined) -> Linear:
        """One vector."""
        if len(x.parts) == 1:
            return x.parts[0]
        pieces: list[Piece] = []
        bias, first = torch.zeros(x.channels, device=self.device), 0
        for part in x.parts:
            stop = first + part.channels
            for piece in part.pieces:
                narrow = self.dense(piece)
                weight = torch.zeros(len(narrow), x.channels, device=self.device)
                weight[:, first:stop] = narrow
                pieces.append(dataclasses.replace(piece, weight=weight))
            if part.bias is not None:
                bias[first:stop] = part.bias
            first = stop
        return Linear(x.channels, x.rows, x.columns, tuple(pieces), bias if bool(bias.any()) else None)

    def times_one(self, x: Linear) -> Linear:
        """The same as a product."""
        weight = torch.eye(x.channels, device=self.device)
        return self.convolved([(self.alone(x), 0, 0, weight)], None)

    def elementwise(self, kind: str, variant: str, x: Linear) -> Linear:
        """An activation or a gate, all of which leave zeros as they are."""
        piece = self.alone(x).alone
        assert piece is not None
        key = (kind, variant, piece.source)
        if key not in self._made:
            make = self.graph.activation if kind == "activation" else self.graph.gate
            self._made[key] = make(piece.source, variant)
            if piece.source in self._known:
                self._known.add(self._made[key])
        return self._whole(self._made[key], piece.dr, piece.dc, x.rows, x.columns)

    def padded(self, x: Linear, top: int, bottom: int, left: int, right: int) -> tuple[Linear, bool]:
        """With zeros around it; a negative number cuts off. And whether these are zeros wherever they are looked at."""
        sure = True
        if max(top, bottom, left, right) > 0:
            x = self.settled(x)
            if x.bias is not None:
                x = self._bounded(x, bottom > 0, right > 0)
            sure = self._is_zero_around(x, top, bottom, left, right)
        return x.window(-top, -left, x.rows + top + bottom, x.columns + left + right), sure

    def _bounded(self, x: Linear, bottom: bool, right: bool) -> Linear:
        """With the bias on the window alone, as far as that is an edge of the grid."""
        assert x.bias is not None
        dr, dc = (self.grid[0] - x.rows) * bottom, (self.grid[1] - x.columns) * right
        return Linear(x.channels, x.rows, x.columns, (*x.pieces, Piece(ONES, dr, dc, x.bias[None])))

    def _is_zero_around(self, x: Linear, top: int, bottom: int, left: int, right: int) -> bool:
        height, width = self.grid
        return x.bias is None and all(
            not (piece.source >= 0 and self._op(piece.source).kind == "static")
            and (top <= 0 or piece.dr <= 0)
            and (left <= 0 or piece.dc <= 0)
            and (bottom <= 0 or x.rows + piece.dr >= height)
            and (right <= 0 or x.columns + piece.dc >= width)
            for piece in x.pieces
        )

    def convolved(self, parts: Sequence[tuple[Linear, int, int, Tensor]], bias: Tensor | None) -> Linear:
        """The sum of matrices [C_in, C_out] times vectors, each at another place, on the grid of the first."""
        pieces = []
        for x, dr, dc, weight in parts:
            if _is_looked_up(x):
                lone = x.pieces[0]
                pieces.append(Piece(CODES, lone.dr + dr, lone.dc + dc, self.dense(lone) @ weight))
                continue
            one = x.alone
            if one is None or one.weight != (0, len(weight)):
                one = self.alone(x).alone
            assert one is not None
            pieces.append(Piece(one.source, one.dr + dr, one.dc + dc, weight))
        if any((piece.dr, piece.dc) != (0, 0) for piece in pieces):
            statics = {
                piece.source for piece in pieces if piece.source >= 0 and self._op(piece.source).kind == "static"
            }
            copies = {source: self._copied(source) for source in statics}
            pieces = [dataclasses.replace(piece, source=copies.get(piece.source, piece.source)) for piece in pieces]
        first, weight = parts[0][0], parts[0][3]
        return Linear(weight.shape[1], first.rows, first.columns, tuple(pieces), bias)

    def attention(self, query: Linear, key: Linear, value: Linear, heads: int, variant: str) -> Linear:
        """Causal attention; scores are divided by the root of a head's width."""
        late = any(_reads_itself(x) for x in (key, value))
        if late and variant == "strict":
            query, key, value = self._a_position_later(query, key, value, heads)
            variant = "inclusive"
        q, k, v = (self._stepwise(x) for x in (query, key, value))
        return self._whole(self.graph.attention(q, k, v, heads, variant))

    def _a_position_later(self, query: Linear, key: Linear, value: Linear, heads: int) -> tuple[Linear, Linear, Linear]:
        """Keys and values that read their own code, at the next position in raster order.

        There the code is known, and what was before a position is before it or there. The first position has no key of
        its own then: one more channel hides it from all others, and its value is zero.
        """
        width = key.channels // heads
        query = query.scaled(
            torch.full((query.channels,), math.sqrt((width + 1) / width), device=self.device), self.dense
        )
        query, key = self._widened(query, heads), self._widened(self._later(key), heads)
        extra = torch.zeros(heads, width + 1, device=self.device)
        extra[:, -1] = 1
        query = query.shifted_by(extra.flatten())
        first = torch.zeros(1, 1, *self.grid, device=self.device)
        first[:, :, 0, 0] = _HIDDEN
        hidden = self.convolved([(self.constant(first), 0, 0, extra.view(1, -1))], None)
        return query, key.plus(hidden), self._later(value)

    def _later(self, x: Linear) -> Linear:
        pieces = [*x.pieces, *([] if x.bias is None else [Piece(ONES, 0, 0, x.bias[None])])]
        moved = []
        for piece in pieces:
            if piece.dc != 0:
                raise NotCausal("keys or values of attention would depend on codes that come later")
            weight, source = self.dense(piece), piece.source
            if source >= 0 and self._op(source).kind == "static":
                source = self._copied(source)
            # From the left, or from the last column of the row above, which lies outside for all columns but the first.
            for dr, dc in ((0, -1), (-1, self.grid[1] - 1)):
                moved.append(Piece(source, piece.dr + dr, dc, weight))
        return Linear(x.channels, x.rows, x.columns, tuple(moved))

    def _widened(self, x: Linear, heads: int) -> Linear:
        """With a channel more for each head."""

        def wider(weight: Tensor) -> Tensor:
            return F.pad(weight.unflatten(-1, (heads, -1)), (0, 1)).flatten(-2)

        pieces = tuple(dataclasses.replace(piece, weight=wider(self.dense(piece))) for piece in x.pieces)
        bias = None if x.bias is None else wider(x.bias)
        return Linear(x.channels + heads, x.rows, x.columns, pieces, bias)

    def _stepwise(self, x: Linear) -> int:
        """An operation that nothing else reads, and that is worked out where a position is sampled."""
        op = self._sum(self.times_one(x) if x.alone is not None else x)
        if op not in self._known:
            return op
        # Nothing, of the code to the left, is not known before.
        nothing = self.graph.lookup_table(((0, -1),), torch.zeros(1, self.num_codes, 1, device=self.device), None)
        none = torch.zeros(1, x.channels, device=self.device)
        return self._affine([Piece(op, 0, 0, (0, x.channels)), Piece(nothing, 0, 0, none)], None, x.channels)

    def output(self, x: Linear) -> int:
        """The operation that gives logits: a product in the step phase."""
        one = self.alone(x).alone
        assert one is not None
        direct = (one.dr, one.dc) == (0, 0) and self._op(one.source).kind == "affine"
        return one.source if direct and one.source not in self._known else self._stepwise(self.alone(x))

    def _copied(self, static: int) -> int:
        """Only operations that are worked out are read at other places."""
        key = ("copy", static)
        if key not in self._made:
            channels = self._op(static).channels
            self._made[key] = self._affine([Piece(static, 0, 0, (0, channels))], None, channels)
        return self._made[key]

    def _emit(self, x: Linear) -> int:
        key = _key(x)
        if key not in self._made:
            self._kept.append(x)
            self._made[key] = self._sum(x)
        return self._made[key]

    def _sum(self, x: Linear) -> int:
        # Weights go on changing in the network, and these are as they are now.
        x = dataclasses.replace(x, bias=None if x.bias is None else x.bias.detach().clone())
        codes = [piece for piece in x.pieces if piece.source == CODES]
        as_is: list[Piece] = []
        products: list[Piece] = []
        bias = x.bias
        for piece in x.pieces:
            if piece.source == CODES:
                continue
            if piece.source == ONES:
                if (piece.dr, piece.dc) == (0, 0):
                    constant = self.dense(piece)[0]
                    bias = constant if bias is None else bias + constant
                else:
                    products.append(Piece(self._ones(piece.dr, piece.dc), 0, 0, piece.weight))
                continue
            # Kernels for whole steps read what is known beforehand through products alone.
            op = self._op(piece.source)
            whole = piece.weight == (0, op.channels) and (piece.dr, piece.dc) == (0, 0) and op.kind != "static"
            (as_is if whole else products).append(piece)
        if not codes and not products and (bias is not None or not as_is):
            if not as_is:
                raise Untraceable("it is the same for all codes")
            products, as_is = as_is[:1], as_is[1:]
        total: int | None = None
        if products:
            total = self._affine(products, bias, x.channels)
            bias = None
        if codes:
            total = self._added(total, self._lookup(codes, bias, x.channels))
        for piece in as_is:
            total = self._added(total, piece.source)
        assert total is not None
        return total

    def _ones(self, dr: int, dc: int) -> int:
        """What is 1 where the grid is that many rows and columns away."""
        key = ("ones", dr, dc)
        if key not in self._made:
            ones = torch.ones(1, *self.grid, 1, device=self.device)
            piece = self.constant(shifted(ones, (dr, dc)).permute(0, 3, 1, 2)).alone
            assert piece is not None
            self._made[key] = piece.source
        return self._made[key]

    def _added(self, a: int | None, b: int) -> int:
        if a is None:
            return b
        found = self.graph.add(a, b)
        if a in self._known and b in self._known:
            self._known.add(found)
        return found

    def _lookup(self, pieces: Sequence[Piece], bias: Tensor | None, channels: int) -> int:
        weights: dict[Tap, Tensor] = {}
        for piece in pieces:
            assert isinstance(piece.weight, Tensor)
            tap = (piece.dr, piece.dc)
            if tap >= (0, 0):
                raise NotCausal(_words("codes", tap))
            weights[tap] = weights[tap] + piece.weight if tap in weights else piece.weight
        nothing = torch.zeros(self.num_codes, channels, device=self.device)
        own = min((dc for dr, dc in weights if dr == 0), default=0)
        # The codes left of a position are read up to its neighbour.
        taps = sorted({*weights, *((0, dc) for dc in range(own, 0))})
        table = torch.stack([weights.get(tap, nothing) for tap in taps])
        op = self.graph.lookup_table(tuple(taps), table, bias)
        if own == 0:
            self._known.add(op)
        return op

    def _affine(self, pieces: Sequence[Piece], bias: Tensor | None, channels: int) -> int:
        sources: dict[int, dict[Tap, Tensor]] = {}
        for piece in pieces:
            weights, tap = sources.setdefault(piece.source, {}), (piece.dr, piece.dc)
            weight = self.dense(piece)
            if tap > (0, 0) and (piece.dr > 0 or piece.source not in self._known):
                raise NotCausal(_words("features", tap))
            weights[tap] = weights[tap] + weight if tap in weights else weight
        terms = []
        for source, weights in sources.items():
            above = {tap: weight for tap, weight in weights.items() if tap[0] < 0}
            own = {tap: weight for tap, weight in weights.items() if tap[0] == 0}
            terms += [_rectangle(source, part) for part in (above, own) if part]
        op = self.graph.affine(terms, bias)
        known = all(dr < 0 or term.source in self._known for term in terms for dr, _ in term.taps)
        if known:
            self._known.add(op)
        return op


def _is_looked_up(x: Linear) -> bool:
    """A vector for one code, and nothing else."""
    return len(x.pieces) == 1 and x.pieces[0].source == CODES and x.bias is None


def _reads_itself(x: Linear) -> bool:
    return any(piece.source == CODES and (piece.dr, piece.dc) >= (0, 0) for piece in x.pieces)


def _key(x: Linear) -> object:
    """Equal for the same sum, as long as its weights live."""
    pieces = tuple((p.source, p.dr, p.dc, p.weight if isinstance(p.weight, tuple) else id(p.weight)) for p in x.pieces)
    return pieces, None if x.bias is None else id(x.bias)


def _rectangle(source: int, weights: dict[Tap, Tensor]) -> Term:
    """A term on the smallest rectangle that holds all taps."""
    rows, columns = [dr for dr, _ in weights], [dc for _, dc in weights]
    taps = [(dr, dc) for dr in range(min(rows), max(rows) + 1) for dc in range(min(columns), max(columns) + 1)]
    nothing = torch.zeros_like(next(iter(weights.values())))
    return Term(source, tuple(taps), torch.stack([weights.get(tap, nothing) for tap in taps]))


def _words(what: str, tap: Tap) -> str:
    dr, dc = tap
    places = [
        f"{abs(n)} {name}{'s' if abs(n) > 1 else ''} {side}"
        for n, name, side in ((dr, "row", "below"), (dc, "column", "to the right" if dc > 0 else "to the left"))
        if n
    ]
    where = " and ".join(places) if places else "at the position itself"
    return f"logits of a position would depend on {what} {where}"
