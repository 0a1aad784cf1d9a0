"""Where the vectors of a micro-batch lie that is sampled along a front, and the tables that its kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastvq.sampling.engines.front_program import Instruction, Level
from fastvq.sampling.engines.front_weights import FrontWeights, Part, Sum
from fastvq.sampling.plan.form import Plan


class _Place(NamedTuple):
    """Where the vectors of an operation lie, in units of padded channels: see `_product_kernel`."""

    base: int
    span: int
    slot: int
    rows: int
    row: int
    sample: int
    col: int


class Layout:
    """Places of everything that a micro-batch remembers.

    Attributes:
        rows: in flight, times the batch: most positions of a step.
        cached_rows: rows of which a slot of a cache has vectors.
        features: units of ``block_k`` numbers in all.
        values: float32 numbers of the vectors of the current step.
    """

    def __init__(self, weights: FrontWeights, batch: int, statics: dict[str, Tensor]) -> None:
        plan, unit = weights.plan, weights.tiles.block_k
        assert plan.skew is not None
        height, width = plan.shape
        self.batch = batch
        self.capacity = plan.front(1).rows * batch
        spans = {op.index: _span(plan, op.index) for op in plan.ops}
        self.cached_rows = min(height, (width + max(spans.values()) - 2) // plan.skew + 1)
        self.places: dict[int, _Place] = {}
        self.statics: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        self.features = 0
        for index in sorted(weights.program.features):
            op = plan.ops[index]
            units = -(-op.channels // unit)
            if op.kind == "static":
                samples, _, rows, columns = statics[op.variant].shape
                col, row, sample = units, units * columns, units * columns * rows
                # What is the same everywhere is read with a stride of 0.
                strides = [stride * (size > 1) for stride, size in ((row, rows), (sample, samples), (col, columns))]
                self.places[index] = _Place(self.features, 1, 0, height, *strides)
                self.statics[index] = (self.features, units, (samples, rows, columns))
                self.features += samples * sample
            else:
                slot = self.cached_rows * batch * units
                rows = self.cached_rows
                self.places[index] = _Place(self.features, spans[index], slot, rows, batch * units, units, 0)
                self.features += spans[index] * slot
        self.values, self.value_places = 0, {}
        for index in sorted(weights.program.values):
            self.value_places[index] = self.values
            self.values += self.capacity * plan.ops[index].channels


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
    rows, numbers = min(height, (width + max(spans.values()) - 2) // plan.skew + 1), 0
    for op in plan.ops:
        if op.kind == "static":
            numbers += op.channels * {"context": height * width, "label": 1}.get(op.variant, 0)
        else:
            numbers += op.channels * rows * spans[op.index]
    step = plan.front(1).rows * sum(op.channels for op in plan.ops)
    return element * numbers + 4 * step + 8 * height * width


class Tables:
    """The tables of numbers that kernels read, and the launches of a step that read them.

    Args:
        grouped: programs compute groups of parts; None where this fills the chip.

    Attributes:
        partials: float32 numbers of the sums that products store.
        launches: kernel by kernel ``product`` or ``tail``, and its first and last program.
    """

    def __init__(self, weights: FrontWeights, layout: Layout, *, grouped: bool | None = None) -> None:
        self.weights, self.layout = weights, layout
        self.items: list[list[int]] = []
        self.programs: list[list[int]] = []
        self.instructions: list[list[int]] = []
        self.chains: list[list[int]] = []
        self.partials = 0
        self._columns_at: dict[int, int] = {}
        tiles = -(-layout.capacity // weights.tiles.block_m)
        groups = sum(-(-len(one.early) // one.group) * weights.column_tiles(one.op) for one in weights.sums.values())
        self.grouped = 2 * tiles * groups >= weights.programs if grouped is None else grouped
        for one in weights.sums.values():
            self._columns_at[one.op.index] = self.partials
            self.partials += (self._early(one) + len(one.late)) * layout.capacity * one.op.channels
        self.launches: list[tuple[str, int, int]] = []
        for number, level in enumerate(weights.program.levels):
            self._products(level, first=number == 0)
            self._stages(level)

    def _early(self, one: Sum) -> int:
        """Sums that the launch of early parts stores."""
        return -(-len(one.early) // one.group) if self.grouped else len(one.early)

    def _products(self, level: Level, *, first: bool) -> None:
        begin = len(self.programs)
        if first:
            for one in self.weights.sums.values():
                length = one.group if self.grouped else 1
                self._programs(one, [one.early[i : i + length] for i in range(0, len(one.early), length)], 0)
        for op in level.products:
            one = self.weights.sums[op.index]
            self._programs(one, [[part] for part in one.late], self._early(one))
        if len(self.programs) > begin:
            self.launches.append(("product", begin, len(self.programs)))

    def _programs(self, one: Sum, runs: Sequence[Sequence[Part]], before: int) -> None:
        op = one.op
        for number, run in enumerate(runs):
            out = self._columns_at[op.index] + (before + number) * self.layout.capacity * op.channels
            for tile in range(self.weights.column_tiles(op)):
                item = len(self.items)
                self.items += [self._item(part, tile) for part in run]
                column = tile * self.weights.tiles.block_n
                self.programs.append([item, len(self.items), out, op.channels, column, 0, 0, 0])

    def _item(self, part: Part, tile: int) -> list[int]:
        term = part.term
        chunks = self.weights.chunks(term)
        (top, left), columns = term.taps[0], [dc for _, dc in term.taps]
        width = max(columns) - min(columns) + 1
        assert term.taps == tuple((top + i // width, left + i % width) for i in range(len(term.taps)))
        weights = part.weights + tile * len(term.taps) * chunks
        place = self.layout.places[term.source]
        return [*place, top, left, width, chunks, part.first, part.last, weights, 0, 0]

    def _stages(self, level: Level) -> None:
        for stage in level.stages:
            begin = len(self.chains)
            for chain in stage:
                first = len(self.instructions)
                self.instructions += [self._instruction(one) for one in chain]
                channels = max(self.weights.plan.ops[one.op].channels for one in chain)
                for channel in range(0, channels, self.weights.tail.block_c):
                    self.chains.append([first, len(self.instructions), channel, 0])
            self.launches.append(("tail", begin, len(self.chains)))

    def _instruction(self, one: Instruction) -> list[int]:
        from fastvq.kernels import front_tail as kernel

        plan, layout = self.weights.plan, self.layout
        read, op = plan.ops[one.read], plan.ops[one.op]
        source = [kernel.SOURCES[one.source], 0, 0, 1, read.channels, 0]
        late = 0
        if one.source == "sum":
            total = self.weights.sums[one.read]
            late = len(total.late)
            group = 1 if self.grouped else total.group
            source[1:4], source[5] = [self._columns_at[one.read], self._early(total), group], total.bias
        elif one.source == "lookup":
            bias, table, taps = self.weights.lookups[one.read]
            source[1:4], source[5] = [table, len(read.taps), taps], bias
        else:
            source[1] = layout.value_places[one.read]
        operand, added = "none", 0
        if one.from_last:
            operand = "last"
        elif one.operand is not None:
            operand, added = "values", layout.value_places[one.operand]
        activation = "" if one.activation is None else plan.ops[one.activation].variant
        behind = [-1, -1, 1] if one.activation is None else self._stored(one.activation)
        # An instruction that only activates what is stored already stores nothing else.
        own = [-1, -1, 1] if one.source == "values" and one.read == one.op else self._stored(one.op)
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
            late,
            *[0] * 5,
        ]

    def _stored(self, index: int) -> list[int]:
        place = self.layout.places.get(index)
        values = self.layout.value_places.get(index, -1)
        return [values, -1, 1] if place is None else [values, place.base, place.span]
