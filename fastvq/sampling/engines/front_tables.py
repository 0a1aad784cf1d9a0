"""Where the vectors of a micro-batch lie that kernels for whole steps read and write, and the tables that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastvq.kernels.front_tiles import PACKED_COLUMNS
from fastvq.sampling.engines.front_program import Instruction, Level
from fastvq.sampling.engines.front_weights import Cut, Part, Segment, Sum
from fastvq.sampling.plan.form import Op, Plan, static_places

# Among values, and a place.
_NOWHERE = [-1, -1, 1, 0, 1, 0, 0, 0]


class _Place(NamedTuple):
    """Where the vectors of an operation lie, in units of channels: see `_product_kernel`."""

    base: int
    span: int
    slot: int
    rows: int
    row: int
    sample: int
    col: int


Sizes = tuple[int, int, int]


class Layout:
    """Places of everything that a micro-batch remembers.

    Args:
        statics: samples, rows and columns of what is known beforehand, by name; 1 where it is the same.

    Attributes:
        capacity: most positions of a step.
        tiles: of the kernel of products.
        rows: positions of a part, whole tiles of them.
        features: units of numbers in all.
        values: float32 numbers of the vectors of the current step.
        partials: float32 numbers of the sums that products store.
    """

    def __init__(self, cut: Cut, batch: int, statics: dict[str, Sizes]) -> None:
        self.cut, self.work, self.batch, self._sizes = cut, cut.work, batch, statics
        plan = self.work.plan
        self._shared = set(self.work.shared)
        self.capacity = batch * (plan.shape[1] if self.work.raster else plan.front(1).rows)
        self.tiles = cut.tiles(self.capacity)
        self.rows = -(-self.capacity // self.tiles.block_m) * self.tiles.block_m
        spans = {} if self.work.raster else {op.index: _span(plan, op.index) for op in plan.ops}
        self.places: dict[int, _Place] = {}
        self.statics: dict[int, tuple[int, int, Sizes]] = {}
        self.features = 0
        for op in self.work.ops:
            if op.kind == "static" and (self.work.raster or op.index in cut.program.features):
                self._place_static(op)
            elif self.work.raster and (op.index in cut.program.features or op.index in plan.history):
                self._place_rows(op)
            elif op.index in cut.program.features:
                self._place_steps(op, spans[op.index], front_rows(plan, spans))
        self.values, self.value_places = 0, {}
        for index in sorted(cut.program.values):
            self.value_places[index] = self.values
            self.values += self.capacity * plan.ops[index].channels
        self.partials = 0
        self.columns_at: dict[int, int] = {}
        for one in cut.sums.values():
            self.columns_at[one.op.index] = self.partials
            self.partials += (len(one.early) + len(one.late)) * self.rows * one.op.channels

    def _units(self, op: Op) -> int:
        """Of a vector, padded to whole blocks where nothing else reads it."""
        block = self.cut.unit if op.index in self._shared else self.cut.depth
        return -(-op.channels // block) * (block // self.cut.unit)

    def _place_static(self, op: Op) -> None:
        """All of the grid."""
        if op.sources:
            parts = [self.statics[source][2] for source in op.sources]
            samples, rows, columns = (max(part[axis] for part in parts) for axis in range(3))
        else:
            samples, rows, columns = self._sizes[op.variant]
        units = self._units(op)
        col, row, sample = units, units * columns, units * columns * rows
        # What is the same everywhere is read with a stride of 0.
        strides = [stride * (size > 1) for stride, size in ((row, rows), (sample, samples), (col, columns))]
        self.places[op.index] = _Place(self.features, 1, 0, self.work.plan.shape[0], *strides)
        self.statics[op.index] = (self.features, units, (samples, rows, columns))
        self.features += samples * sample

    def _place_rows(self, op: Op) -> None:
        """The rows that are read, with zeros left of the grid, which the steps of a row read too."""
        past, units, width = self.work.plan.history.get(op.index), self._units(op), self.work.plan.shape[1]
        rows, left = (1, 0) if past is None else (past.above + 1, past.left)
        row = (left + width) * units
        self.places[op.index] = _Place(self.features + left * units, 1, 0, rows, row, rows * row, units)
        self.features += self.batch * rows * row

    def _place_steps(self, op: Op, span: int, rows: int) -> None:
        """The steps that are read, all of a step together."""
        units = self._units(op)
        slot = rows * self.batch * units
        self.places[op.index] = _Place(self.features, span, slot, rows, self.batch * units, units, 0)
        self.features += span * slot

    @property
    def numbers(self) -> tuple[int, int]:
        """Of what products read, and of float32 beside them."""
        return self.features * self.cut.unit, self.values + self.partials

    @property
    def bytes(self) -> int:
        """Of what products read, as planes and, in raster order, as it is; and of what they leave."""
        features, floats = self.numbers
        kept = 2 * self.cut.planes + (4 if self.work.raster else 0)
        return kept * features + 4 * floats


def static_sizes(statics: dict[str, Tensor]) -> dict[str, Sizes]:
    """Of tensors [B or 1, C, H or 1, W or 1]."""
    return {name: (x.shape[0], x.shape[2], x.shape[3]) for name, x in statics.items()}


def front_rows(plan: Plan, spans: dict[int, int]) -> int:
    """Rows of which a slot of a cache has vectors along a front."""
    assert plan.skew is not None
    height, width = plan.shape
    return min(height, (width + max(spans.values()) - 2) // plan.skew + 1)


def _span(plan: Plan, index: int) -> int:
    """Steps for which the vectors of an operation are kept."""
    past = plan.history.get(index)
    assert plan.skew is not None
    return 1 if past is None else plan.skew * past.above + past.left + 1


def front_bytes(plan: Plan, element: int) -> int:
    """Bytes per sample of vectors that products read, with elements of that size, and of those of a step."""
    assert plan.skew is not None
    height, width = plan.shape
    spans = {op.index: _span(plan, op.index) for op in plan.ops}
    rows, numbers = front_rows(plan, spans), 0
    for op in plan.ops:
        if op.kind == "static":
            numbers += op.channels * static_places(op, height * width)
        else:
            numbers += op.channels * rows * spans[op.index]
    step = plan.front(1).rows * sum(op.channels for op in plan.ops)
    return element * numbers + 4 * step + 8 * height * width


class Tables:
    """The tables of numbers that kernels read, and the launches of a step that read them.

    Attributes:
        launches: kernel by kernel ``product`` or ``tail``, and its first and last program.
        shared: where the last row of operations lies whose vectors come from elsewhere: see `_planes_kernel`.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.cut = layout, layout.cut
        self.items: list[list[int]] = []
        self.programs: list[list[int]] = []
        self.instructions: list[list[int]] = []
        self.chains: list[list[int]] = []
        self.launches: list[tuple[str, int, int]] = []
        self.shared = [self._row(layout.places[index]) for index in self.cut.work.shared]
        for number, level in enumerate(self.cut.program.levels):
            self._products(level, first=number == 0)
            self._stages(level)

    def _row(self, place: _Place) -> list[int]:
        return [place.base, place.rows, place.row, place.sample, place.col * self.cut.work.plan.shape[1], 0, 0, 0]

    def _products(self, level: Level, *, first: bool) -> None:
        begin = len(self.programs)
        if first:
            for one in self.cut.sums.values():
                self._programs(one, one.early, 0)
        for op in level.products:
            one = self.cut.sums[op.index]
            self._programs(one, one.late, len(one.early))
        if len(self.programs) > begin:
            self.launches.append(("product", begin, len(self.programs)))

    def _programs(self, one: Sum, parts: Sequence[Part], before: int) -> None:
        op, width = one.op, self.layout.tiles.block_n
        for number, part in enumerate(parts):
            out = self.layout.columns_at[op.index] + (before + number) * self.layout.rows * op.channels
            for column in range(0, op.channels, width):
                item = len(self.items)
                self.items += [self._item(segment, column) for segment in part]
                self.programs.append([item, len(self.items), out, op.channels, column, 0, 0, 0])

    def _item(self, segment: Segment, column: int) -> list[int]:
        term, chunks = segment.term, self.cut.chunks(segment.term)
        (top, left), columns = term.taps[0], [dc for _, dc in term.taps]
        width = max(columns) - min(columns) + 1
        assert term.taps == tuple((top + i // width, left + i % width) for i in range(len(term.taps)))
        tile, within = divmod(column, PACKED_COLUMNS)
        weights = segment.weights + tile * len(term.taps) * chunks
        place, last = self.layout.places[term.source], segment.last
        return [*place, top, left, width, chunks, segment.first, last, weights, term.weight.shape[1], within]

    def _stages(self, level: Level) -> None:
        for stage in level.stages:
            begin = len(self.chains)
            for chain in stage:
                first = len(self.instructions)
                self.instructions += [self._instruction(one) for one in chain]
                channels = max(self.cut.work.ops[one.op].channels for one in chain)
                for channel in range(0, channels, self.cut.tail.block_c):
                    self.chains.append([first, len(self.instructions), channel, 0])
            self.launches.append(("tail", begin, len(self.chains)))

    def _instruction(self, one: Instruction) -> list[int]:
        from fastvq.kernels import front_tail as kernel

        ops, layout = self.cut.work.ops, self.layout
        read, op = ops[one.read], ops[one.op]
        source = [kernel.SOURCES[one.source], 0, 0, 1, read.channels, 0]
        if one.source == "sum":
            total = self.cut.sums[one.read]
            source[1:3], source[5] = [self.layout.columns_at[one.read], len(total.early) + len(total.late)], total.bias
        elif one.source == "lookup":
            bias, table, taps = self.cut.lookups[one.read]
            source[1:4], source[5] = [table, len(read.taps), taps], bias
        else:
            source[1] = layout.value_places[one.read]
        operand, added = "none", 0
        if one.from_last:
            operand = "last"
        elif one.operand is not None:
            operand, added = "values", layout.value_places[one.operand]
        activation = "" if one.activation is None else ops[one.activation].variant
        behind = _NOWHERE if one.activation is None else self._stored(one.activation)
        # An instruction that only activates what is stored already stores nothing else.
        own = _NOWHERE if one.source == "values" and one.read == one.op else self._stored(one.op)
        return [
            *source,
            kernel.GATES[one.gate],
            kernel.OPERANDS[operand],
            added,
            *own,
            kernel.ACTIVATIONS[activation],
            *behind,
            int(one.leaves != one.op),
            op.channels,
            *[0] * 4,
        ]

    def _stored(self, index: int) -> list[int]:
        """Where a vector is stored: among values, and at a place of its own."""
        values = self.layout.value_places.get(index, -1)
        place = None if index in self.cut.work.starts else self.layout.places.get(index)
        return [values, *(_NOWHERE[1:] if place is None else place)]
