"""What a micro-batch remembers while its grids are filled row by row, and the row phase by PyTorch's convolutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling.plan.evaluate import elementwise
from fastvq.sampling.plan.form import History, Op, Plan, Term, extent, static_places
from fastvq.sampling.request import SampleRequest

# Samples whose conditions are worked out together, however few there are.
_TOGETHER = 4


class Window(NamedTuple):
    """What of a ring a position reads: ``height`` rows from ``top`` rows above on, columns from ``left`` of it on."""

    top: int
    height: int
    left: int
    extra: int

    @classmethod
    def of(cls, term: Term, history: History) -> Window:
        rows, columns = [dr for dr, _ in term.taps], [dc for _, dc in term.taps]
        height, width = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
        if height * width != len(term.taps):
            raise AssertionError(f"taps {term.taps} do not fill a rectangle")
        return cls(-min(rows), height, history.left + min(columns), width - 1)

    def read(self, ring: Ring, width: int) -> Tensor:
        """[B, height, width + extra, C]."""
        first = ring.slot - self.top
        return ring.data[:, first : first + self.height, self.left : self.left + width + self.extra]


class RowConv:
    """The row part of one term as a convolution over the channels-last history of its source."""

    def __init__(self, term: Term, history: History | None, device: torch.device) -> None:
        self.source = term.source
        self.direct = set(term.taps) == {(0, 0)}
        self.top = max(-dr for dr, _ in term.taps)
        weight = term.weight.to(device)
        if self.direct:
            self.weight = weight[0]
            return
        assert history is not None
        self._window = Window.of(term, history)
        height, width = self._window.height, self._window.extra + 1
        self._packed: tuple[tuple[int, ...], Tensor] | None = None
        shaped = weight.reshape(height, width, *weight.shape[1:]).permute(3, 2, 0, 1)  # [C_out, C_in, height, width]
        self._prepack = device.type == "cpu" and _PREPACK
        # What gets packed later needs no copy of its own in between: weights are most of the memory.
        self.weight = shaped if self._prepack else shaped.contiguous(memory_format=torch.channels_last)

    def __call__(self, rows: dict[int, Tensor], ring: Ring | None, width: int) -> Tensor:
        """[B, W, C_out] (W = 1 if the source is the same at all positions)."""
        if self.direct:
            return rows[self.source] @ self.weight
        assert ring is not None
        x = self._window.read(ring, width)
        return self._conv(x.permute(0, 3, 1, 2))[:, :, 0].transpose(1, 2)

    def _conv(self, x: Tensor) -> Tensor:
        if not self._prepack:
            return F.conv2d(x, self.weight)
        # An eager convolution on a CPU reorders its weights on every call, which costs as much as the products
        # themselves for small batches. Weights reordered beforehand give the same sums.
        padding, stride, dilation = [0, 0], [1, 1], [1, 1]
        shape = tuple(x.shape)
        packed = self._packed  # read once: another thread may sample another number of samples
        if packed is None or packed[0] != shape:
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
            plain = self.weight.contiguous().to_mkldnn()
            packed = (shape, reorder(plain, padding, stride, dilation, 1, list(shape)))  # type: ignore[call-arg]
            self._packed = packed
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, packed[1], None, padding, stride, dilation, 1, "none", [], "")


def _can_prepack() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


_PREPACK = _can_prepack()


class CompiledPlan:
    """A plan with its row weights made ready for one device; used by any number of micro-batches."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.bias = {op.index: op.bias.to(device) for op in plan.ops if op.bias is not None}
        self.convs = {
            index: [RowConv(t, plan.history.get(t.source), device) for t in terms]
            for index, terms in plan.row_terms.items()
        }
        self.above_tables = {op.index: above for op in plan.ops if (above := _above_table(op, device)) is not None}


def _above_table(op: Op, device: torch.device) -> tuple[list[tuple[int, int]], Tensor] | None:
    """The taps of a lookup on rows above, and its vectors [T * K + 1, C] for them, the last one zero."""
    if op.kind != "lookup" or op.weight is None:
        return None
    chosen = [index for index, (dr, _) in enumerate(op.taps) if dr < 0]
    if not chosen:
        return None
    table = op.weight[chosen].flatten(0, 1)
    return [op.taps[i] for i in chosen], torch.cat([table, table.new_zeros(1, op.channels)]).to(device)


class Ring:
    """The last rows of one operation's output, channels last, with zeros around the grid: [B, rows, W + padding, C].

    Rows are written one after the other; when the buffer is full, the rows that are still read move to its start.
    """

    def __init__(self, history: History, batch: int, width: int, channels: int, device: torch.device) -> None:
        self.above, self.left = history.above, history.left
        columns = width + history.left + history.right
        sizes = (batch, ring_rows(history), columns, channels)
        self.data = torch.zeros(sizes, dtype=torch.float32, device=device)
        self.slot = history.above

    def clear(self) -> None:
        self.data.zero_()
        self.slot = self.above

    def advance(self) -> None:
        self.slot += 1
        if self.slot == self.data.shape[1]:
            if self.above:
                self.data[:, : self.above] = self.data[:, self.slot - self.above :].clone()
            self.slot = self.above


def ring_rows(history: History) -> int:
    """Rows of a ring: twice what is read, so that rows move only every ``above + 2`` rows."""
    return 2 * (history.above + 1)


class RowState(ABC):
    """What a micro-batch remembers that is filled row by row.

    Args:
        statics: what is known before the first position, of the shapes that `static_inputs` gives.

    Attributes:
        codes: int64 [B, H, W].
        keys: float32 [B, C, positions], padded, by operation. They lie channel by channel, so that scores of
            consecutive positions are one vector.
        values: float32 [B, positions, C], by operation.
        rows: float32 [B, W or 1, C], of the row that has begun: the values of row operations, and what step operations
            start from.
    """

    rows: dict[int, Tensor]

    def __init__(self, plan: Plan, device: torch.device, batch: int, statics: dict[str, Tensor]) -> None:
        height, self.width = plan.shape
        self.plan, self.device, self.batch, self.statics = plan, device, batch, statics
        self.codes = torch.zeros(batch, height, self.width, dtype=torch.int64, device=device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for op in plan.ops:
            if op.kind == "attention":
                _, key, value = op.sources
                positions = height * self.width
                sizes = (batch, plan.ops[key].channels, padded(positions))
                self.keys[key] = torch.zeros(sizes, dtype=torch.float32, device=device)
                sizes = (batch, positions, plan.ops[value].channels)
                self.values[value] = torch.zeros(sizes, dtype=torch.float32, device=device)

    def begin(self, codes: Tensor) -> None:
        """Forget the last grid; ``codes`` [B, H, W] are those that the next one starts from."""
        for cache in (*self.keys.values(), *self.values.values()):
            cache.zero_()
        self.codes.copy_(codes)

    @abstractmethod
    def begin_row(self, row: int) -> None:
        """Work out what is known about this row before it starts. Rows follow one another."""

    @abstractmethod
    def cache_row(self, index: int) -> Tensor:
        """Where the vectors of the row that has begun go of an operation whose past is read: float32 [B, W, C]."""


class SteadyState(RowState):
    """Caches in which everything has its place before the first row: views of all rows can be known then."""

    @abstractmethod
    def go_to(self, row: int) -> None:
        """Let `rows` and `cache_row` lead to where those of a row are, whatever is there yet."""

    @abstractmethod
    def cached_rows(self, index: int) -> int:
        """Rows after which `cache_row` is the same place again."""


class GridState(RowState):
    """Caches for a row phase by PyTorch's convolutions."""

    def __init__(self, compiled: CompiledPlan, batch: int, statics: dict[str, Tensor]) -> None:
        super().__init__(compiled.plan, compiled.device, batch, statics)
        self.compiled = compiled
        plan, device = compiled.plan, compiled.device
        self.rings = {
            index: Ring(history, batch, self.width, plan.ops[index].channels, device)
            for index, history in plan.history.items()
        }
        self.rows = {}
        self._find_uniform()

    def _find_uniform(self) -> None:
        self._uniform: dict[int, Tensor] = {}
        for op in self.plan.row_ops():
            if op.index in self.plan.uniform:
                self._uniform[op.index] = self._row_value(op, 0, self._uniform)

    def begin(self, codes: Tensor) -> None:
        super().begin(codes)
        for ring in self.rings.values():
            ring.clear()
        self._find_uniform()

    def cache_row(self, index: int) -> Tensor:
        ring = self.rings[index]
        return ring.data[:, ring.slot, ring.left : ring.left + self.width]

    def begin_row(self, row: int) -> None:
        if row:
            for ring in self.rings.values():
                ring.advance()
        self.rows = {}  # the last row's values make room for this one's
        rows = dict(self._uniform)
        for op in self.plan.ops:
            if op.index in rows or (self.plan.timing[op.index] != "row" and op.kind not in ("affine", "lookup")):
                continue
            rows[op.index] = self._row_value(op, row, rows)
            if op.index in self.rings and self.plan.timing[op.index] == "row":
                self.cache_row(op.index).copy_(rows[op.index])
        self.rows = rows

    def _row_value(self, op: Op, row: int, rows: dict[int, Tensor]) -> Tensor:
        if op.kind == "static":
            features = self.statics[op.variant]  # [B or 1, C, H or 1, W or 1]
            features = features if extent(op.variant) == "label" else features[:, :, row : row + 1]
            return features[:, :, 0].transpose(1, 2).expand(self.batch, -1, -1)
        if op.kind == "affine":
            total = self.compiled.bias[op.index].expand(self.batch, 1, -1)
            for conv in self.compiled.convs[op.index]:
                # Rows above the grid are zero, and so is what they add to its first row.
                if row or conv.top == 0 or self.plan.timing[conv.source] == "row":
                    total = total + conv(rows, self.rings.get(conv.source), self.width)
            return total
        if op.kind == "lookup":
            return self._lookup_above(op, row)
        sources = [rows[source] for source in op.sources]
        return elementwise(op, sources)

    def _lookup_above(self, op: Op, row: int) -> Tensor:
        bias = self.compiled.bias[op.index].expand(self.batch, 1, -1)
        found = self.compiled.above_tables.get(op.index)
        if found is None or row == 0:
            return bias
        taps, table = found
        left, right = max(0, *(-dc for _, dc in taps)), max(0, *(dc for _, dc in taps))
        nothing = table.shape[0] - 1
        index = torch.full((self.batch, self.width, len(taps)), nothing, device=table.device)
        for tap, (dr, dc) in enumerate(taps):
            if row + dr < 0:
                continue
            padded = F.pad(self.codes[:, row + dr] + tap * self.plan.num_codes, (left, right), value=nothing)
            index[:, :, tap] = padded[:, left + dc : left + dc + self.width]
        found_rows = F.embedding_bag(index.flatten(0, 1), table, mode="sum")
        return found_rows.view(self.batch, self.width, -1) + bias


def static_inputs(prior: Prior, request: SampleRequest) -> dict[str, Tensor]:
    """What is known before the first position: [B or 1, C, H or 1, W or 1] by name."""
    return prior.statics(request.condition, request.label, batch=len(request.noise))


def steady_statics(prior: Prior, request: SampleRequest) -> dict[str, Tensor]:
    """`static_inputs` with conditions in batches of one size: libraries round differently for other batches.

    The last one is filled up by its last sample. In a batch of one shape a library does the same for every sample.
    """
    if not request.condition:
        return static_inputs(prior, request)
    batch = len(request.noise)
    some = torch.arange(-(-batch // _TOGETHER) * _TOGETHER, device=request.noise.device).clamp(max=batch - 1)
    each = [static_inputs(prior, request.rows(rows)) for rows in some.split(_TOGETHER)]
    return {
        name: torch.cat([one[name] for one in each])[:batch] if extent(name) in ("context", "label") else x
        for name, x in each[0].items()
    }


def padded(positions: int) -> int:
    """Positions rounded up to whole vectors of the widest instruction set."""
    return -(-positions // 16) * 16


def common_bytes(plan: Plan, places: int) -> int:
    """Bytes per sample of a `RowState` and what goes with it, with ``places`` for the current position's vectors."""
    height, width = plan.shape
    floats = 0
    kept = {*plan.history, *(op.sources[2] for op in plan.ops if op.kind == "attention")}
    for op in plan.ops:
        if op.kind == "attention":
            _, key, value = op.sources
            floats += padded(height * width) * plan.ops[key].channels + height * width * plan.ops[value].channels
        if op.kind == "static":
            floats += op.channels * static_places(op, height * width)
        if plan.level[op.index] >= 0 and op.index not in kept:
            floats += places * op.channels
    return torch.float32.itemsize * floats + torch.int64.itemsize * height * width


def cache_bytes(plan: Plan, places: int) -> int:
    """Bytes per sample of a `GridState` and what goes with it, see `common_bytes`."""
    width, floats = plan.shape[1], 0
    for index, history in plan.history.items():
        floats += ring_rows(history) * (width + history.left + history.right) * plan.ops[index].channels
    for op in plan.ops:
        begins = plan.level[op.index] < 0 or plan.row_terms.get(op.index) or any(dr < 0 for dr, _ in op.taps)
        if op.kind != "static" and begins:
            floats += op.channels * (width if _varies(op, plan) else 1)
    return common_bytes(plan, places) + torch.float32.itemsize * floats


def _varies(op: Op, plan: Plan) -> bool:
    """Whether what the row phase works out for an operation differs from column to column."""
    if op.kind == "affine":
        return any(term.source not in plan.uniform for term in plan.row_terms[op.index])
    return op.index not in plan.uniform


def weight_bytes(plan: Plan, element: int = 4) -> int:
    """Bytes of the plan's own weights, and of a packed copy with elements of that size."""
    terms = (term for op in plan.ops for term in op.terms)
    packed = sum(term.weight.numel() for term in terms)
    tables = sum(op.weight.numel() for op in plan.ops if op.weight is not None)
    return (torch.float32.itemsize + element) * packed + 2 * torch.float32.itemsize * tables
