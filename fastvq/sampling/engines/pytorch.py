"""The cached sampler in PyTorch: the plan, interpreted. It is what the compiled engines are read against.

Positions are sampled along the front of a plan, see :class:`fastvq.sampling.plan.Front`; raster order is the front of
tiles as wide as the grid. A tile step first works out all that its positions need of the rows above and of what is
known beforehand, for all of them at once, and then goes through the columns of its tiles. An affine operation is summed
in one order, whatever the tile: bias, terms that are the same at all positions, rows above and what else is known
beforehand, then the position's own row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone, Schedule
from fastvq.sampling.engines.front_state import Layout, Store, TileStep, Turn
from fastvq.sampling.engines.phases import OnPhase, Phases
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.engines.state import static_inputs, weight_bytes
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan import Front, History, Op, Plan, Tap, Term, require_finite
from fastvq.sampling.plan.evaluate import elementwise
from fastvq.sampling.plan.form import extent, static_places
from fastvq.sampling.request import SampleRequest

_HERE: tuple[Tap, ...] = ((0, 0),)


class Product(NamedTuple):
    """A term, or a part of one, with its weights as one matrix [T * C_in, C_out]."""

    source: int
    taps: tuple[Tap, ...]
    weight: Tensor

    @classmethod
    def of(cls, term: Term, device: torch.device) -> Product:
        return cls(term.source, term.taps, term.weight.flatten(0, 1).to(device))


class Table(NamedTuple):
    """Some taps of a lookup and their vectors [T * (K + 1), C]; code K is nothing, and its vector zero."""

    taps: tuple[Tap, ...]
    vectors: Tensor
    first: Tensor  # [T]: of each tap's vectors

    @classmethod
    def of(cls, op: Op, device: torch.device, *, above: bool) -> Table | None:
        assert op.weight is not None
        chosen = [tap for tap, (dr, _) in enumerate(op.taps) if (dr < 0) == above]
        if not chosen:
            return None
        vectors = F.pad(op.weight[chosen], (0, 0, 0, 1))
        first = torch.arange(len(chosen), device=device) * vectors.shape[1]
        return cls(tuple(op.taps[tap] for tap in chosen), vectors.flatten(0, 1).to(device), first)


class TorchPlan:
    """A plan with its weights on a device, split by what is known before a tile is entered.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        require_finite(plan)
        self.plan, self.device = plan, device
        self.bias = {op.index: op.bias.to(device) for op in plan.ops if op.bias is not None}
        self.uniform: dict[int, list[Product]] = {}
        self.above: dict[int, list[Product]] = {}
        self.own: dict[int, list[Product]] = {}
        for index, terms in plan.row_terms.items():
            products = [Product.of(term, device) for term in terms]
            self.uniform[index] = [product for product in products if product.source in plan.uniform]
            self.above[index] = [product for product in products if product.source not in plan.uniform]
            self.own[index] = [Product.of(term, device) for term in plan.step_terms[index]]
        lookups = [op for op in plan.ops if op.kind == "lookup"]
        self.tables_above = {op.index: Table.of(op, device, above=True) for op in lookups}
        self.tables_own = {op.index: Table.of(op, device, above=False) for op in lookups}
        self.step_ops = list(plan.step_ops())


class TorchGrid:
    """Grids of a micro-batch on their way along a front.

    Vectors of several positions are matrices [N, C], an entry of the tile step a row.

    Attributes:
        codes: int64 [B, H, W].
        stores: by operation, where its vectors are kept for later positions.
        tile: the step begun last.
    """

    tile: TileStep

    def __init__(self, prepared: TorchPlan, front: Front, batch: int, statics: dict[str, Tensor]) -> None:
        self.prepared, self.plan, self.front, self.batch = prepared, prepared.plan, front, batch
        height, width = front.shape
        # Around the grid lies nothing.
        layout = Layout.whole(front, _reach([op.taps for op in self.plan.ops if op.kind == "lookup"]))
        sizes = (batch, layout.rows, layout.columns)
        self._codes = Store(layout, torch.full(sizes, self.plan.num_codes, device=prepared.device))
        self.codes = self._codes.grid[:, :height, layout.left : layout.left + width]
        self.stores: dict[int, list[Store]] = {}
        for index, history in self.plan.history.items():
            self._keep(index, Layout.rolling(front, history))
        self._attended: dict[int, Store] = {}
        for op in self.plan.ops:
            if op.kind == "attention":
                for source in op.sources[1:]:
                    self._attended[source] = self._keep(source, Layout(height, 0, width))
        # [B, C, H, W], or [B, C] of a label.
        self._statics = {
            name: features[:, :, 0, 0].float().expand(batch, -1)
            if extent(name) == "label"
            else features.float().expand(batch, -1, height, width)
            for name, features in statics.items()
        }
        self._begun: dict[int, Tensor] = {}  # what operations of the tile step are, or start from
        self._values: dict[int, Tensor] = {}  # of the turn
        self._uniform: dict[int, Tensor] = {}
        self._starts: dict[int, Tensor] = {}
        for op in self.plan.ops:
            if op.index in self.prepared.bias:
                total = self.prepared.bias[op.index].expand(batch, -1)
                for product in self.prepared.uniform.get(op.index, ()):
                    total = torch.addmm(total, self._uniform[product.source], product.weight)
                self._starts[op.index] = total
            if op.index in self.plan.uniform:
                self._uniform[op.index] = self._uniform_value(op)

    def begin(self, step: int) -> None:
        """Work out what a tile step needs of the rows above and of what is known beforehand."""
        self._begun, self._values = {}, {}  # the last step's make room
        tile = self.tile = TileStep(self.front, step, self.batch, self.prepared.device)
        for op in self.plan.ops:
            known = self.plan.timing[op.index] == "row"
            if op.index in self.plan.uniform or not (known or op.kind in ("affine", "lookup")):
                continue
            self._begun[op.index] = self._value_above(op)
            if known:
                self._leave(op, tile.entries, self._begun[op.index])

    def logits(self, turn: Turn) -> Tensor:
        """Logits [N, K] of the entries of a turn, all turns before it being drawn."""
        self._values = {}
        for op in self.prepared.step_ops:
            value = self._value_own(op, turn)
            self._values[op.index] = value
            self._leave(op, turn.entries, value)
        return self._vectors(self.plan.output, turn.entries)

    def _keep(self, index: int, layout: Layout) -> Store:
        store = Store.zeros(layout, self.batch, self.plan.ops[index].channels, self.prepared.device)
        self.stores.setdefault(index, []).append(store)
        return store

    def _leave(self, op: Op, entries: slice, values: Tensor) -> None:
        for store in self.stores.get(op.index, ()):
            store.write(self.tile, entries, values)

    def _vectors(self, source: int, entries: slice) -> Tensor:
        """Of an operation, at the entries themselves."""
        if source in self._values:
            return self._values[source]
        if source in self._uniform:
            return self._uniform[source].repeat((entries.stop - entries.start) // self.batch, 1)
        return self._begun[source][entries]

    def _uniform_value(self, op: Op) -> Tensor:
        """[B, C]"""
        if op.kind == "static":
            return self._statics[op.variant]
        if op.kind == "affine":
            return self._starts[op.index]
        return elementwise(op, [self._uniform[source] for source in op.sources])

    def _value_above(self, op: Op) -> Tensor:
        tile, everything = self.tile, self.tile.entries
        if op.kind == "static":
            return self._statics[op.variant][tile.samples, :, tile.rows, tile.columns]
        if op.kind not in ("affine", "lookup"):
            return elementwise(op, [self._vectors(source, everything) for source in op.sources])
        start = self._starts[op.index].repeat(everything.stop // self.batch, 1)
        if op.kind == "lookup":
            return self._looked_up(start, self.prepared.tables_above[op.index], everything)
        return self._summed(start, self.prepared.above[op.index], everything)

    def _value_own(self, op: Op, turn: Turn) -> Tensor:
        if op.kind == "attention":
            return self._attend(op, turn)
        if op.kind not in ("affine", "lookup"):
            return elementwise(op, [self._vectors(source, turn.entries) for source in op.sources])
        start = self._begun[op.index][turn.entries]
        if op.kind == "lookup":
            return self._looked_up(start, self.prepared.tables_own[op.index], turn.entries)
        return self._summed(start, self.prepared.own[op.index], turn.entries)

    def _summed(self, total: Tensor, products: list[Product], entries: slice) -> Tensor:
        for source, taps, weight in products:
            if taps == _HERE:
                x = self._vectors(source, entries)
            else:
                x = self.stores[source][0].read(self.tile, entries, taps)
            total = torch.addmm(total, x, weight)
        return total

    def _looked_up(self, total: Tensor, table: Table | None, entries: slice) -> Tensor:
        if table is None:
            return total
        codes = self._codes.read(self.tile, entries, table.taps)
        return total + F.embedding_bag(codes + table.first, table.vectors, mode="sum")

    def _attend(self, op: Op, turn: Turn) -> Tensor:
        query, key, value = op.sources
        ((row, column),) = turn.positions  # there is attention in raster order alone
        count = row * self.front.shape[1] + column + (op.variant == "inclusive")
        if count == 0:
            return torch.zeros(self.batch, op.channels, dtype=torch.float32, device=self.prepared.device)
        q = self._vectors(query, turn.entries).unflatten(1, (op.heads, 1, -1))  # [B, heads, 1, D]
        k, v = (
            self._attended[source].grid.flatten(1, 2)[:, :count].unflatten(2, (op.heads, -1)).transpose(1, 2)
            for source in (key, value)
        )  # [B, heads, N, D]
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


def _reach(read: list[tuple[Tap, ...]]) -> History:
    """What the taps of some operations read around a position."""
    taps = [tap for taps in read for tap in taps]
    rows, columns = [0, *(dr for dr, _ in taps)], [0, *(dc for _, dc in taps)]
    return History(-min(rows), -min(columns), max(columns))


def front_of(plan: Plan, tile: int | None) -> Front:
    """With tiles of that many columns, or the front that should be fastest.

    Raises:
        ArgumentError: a tile that does not fit, see :meth:`fastvq.sampling.plan.Plan.front`.
    """
    # Calls are what the time goes into, so the fewest steps win.
    fastest = plan.shape[1] if plan.skew is None else 1
    return plan.front(fastest if tile is None else tile)


def sample_torch(
    grid: TorchGrid,
    request: SampleRequest,
    row_done: RowDone,
    on_phase: OnPhase | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]. ``logits`` [n, H, W, K] receives those of all positions."""
    phases, done = Phases(on_phase, grid.prepared.device), 0
    grid.codes.copy_(request.start_codes())
    for step in range(grid.front.steps):
        with phases.phase("row phase"):
            grid.begin(step)
        with phases.phase("step phase"):
            for turn in grid.tile.turns:
                found, at = grid.logits(turn), grid.tile.at(turn)
                if logits is not None:
                    logits[at] = found
                request.draw_at(grid.codes, found, at)
        complete = grid.front.last_rows(step)
        if complete > done:
            row_done(complete - done, grid.codes)
            done = complete
    phases.finish()
    return grid.codes.contiguous()


def grid_bytes(plan: Plan, front: Front) -> int:
    """Bytes per sample that filling grids takes beside the weights."""
    (height, width), at_once = plan.shape, front.rows * front.tile
    floats = sum(
        plan.ops[index].channels * math.prod(Layout.rolling(front, history)[::2])
        for index, history in plan.history.items()
    )
    largest = 0
    for op in plan.ops:
        if op.kind == "static":
            floats += op.channels * static_places(op, height * width)
        elif op.kind == "attention":
            floats += height * width * (plan.ops[op.sources[1]].channels + plan.ops[op.sources[2]].channels)
        elif op.index in plan.uniform:
            floats += op.channels
        elif plan.timing[op.index] == "row" or op.kind in ("affine", "lookup"):
            floats += op.channels * at_once
        if plan.level[op.index] >= 0:
            floats += op.channels * front.rows
        # A window is gathered before it is multiplied.
        gathered = [term.weight[..., 0].numel() for term in plan.row_terms.get(op.index, ())]
        largest = max([largest, *gathered])
    return torch.float32.itemsize * (floats + largest * at_once) + torch.int64.itemsize * height * width


_Packed = tuple[TorchPlan, Front]


class TorchEngine(Engine[_Packed]):
    name = "torch"
    plans = True
    tiles = True

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        front = front_of(plan, options.tile)
        reason = "asked for" if options.tile is not None else "the fewest steps" if plan.skew else plan.raster_reason
        return Schedule(front, str(reason), weight_bytes(plan), batch * grid_bytes(plan, front))

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        front = front_of(kept.plan, options.tile)
        return kept.get(self.name, None, lambda: TorchPlan(kept.plan, kept.device)), front

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        grid = TorchGrid(*prepared, len(request.noise), static_inputs(prior, request))
        return sample_torch(grid, request, row_done, on_phase)
