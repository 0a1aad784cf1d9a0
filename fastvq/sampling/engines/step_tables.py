"""What the compiled engines are handed: a plan's step phase as tables of numbers, and where its vectors lie."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, array_address, strided_address
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.sampling.engines.state import RowState, SteadyState, padded
from fastvq.sampling.plan.form import Op, Plan, Term, require_finite
from fastvq.sampling.request import Settings

VIEW_FIELDS = 4

# Column masks of views: vectors of every column, two places in turn for the current column, one for all columns.
EVERY_COLUMN, IN_TURN, SAME = -1, 1, 0

_WORD, _ADDRESS = np.int64, np.uint64

# The structs of csrc/plan_spec.h, and that of static operations' values.
OP = np.dtype(
    [
        ("kind", _WORD),
        ("channels", _WORD),
        ("level", _WORD),
        ("paired", _WORD),
        ("sources", _WORD, 3),
        ("heads", _WORD),
        ("inclusive", _WORD),
        ("first_term", _WORD),
        ("num_terms", _WORD),
        ("num_taps", _WORD),
        ("weights", _ADDRESS),
        ("num_weights", _WORD),
        ("above_level", _WORD),
        ("uniform", _WORD),
        ("first_once", _WORD),
        ("num_once", _WORD),
        ("first_above", _WORD),
        ("num_above", _WORD),
        ("bias", _ADDRESS),
    ]
)
TERM = np.dtype(
    [
        ("source", _WORD),
        ("first_column", _WORD),
        ("num_columns", _WORD),
        ("weights", _ADDRESS),
        ("num_weights", _WORD),
        ("first_row", _WORD),
        ("num_rows", _WORD),
    ]
)
STATIC = np.dtype([("data", _ADDRESS), ("sample_stride", _WORD), ("row_stride", _WORD), ("column_stride", _WORD)])


@functools.cache
def kind_numbers() -> dict[str, int]:
    """The extension's number of each kind of operation, by name.

    Raises:
        AssertionError: the structs above are not those of the extension.
    """
    layout = _engine.require().PLAN_LAYOUT
    for name, dtype in (("op", OP), ("term", TERM), ("static", STATIC)):
        fields = dtype.fields
        assert fields is not None
        ours = (dtype.itemsize, [(field, fields[field][1]) for field in dtype.names or ()])
        if layout[name] != ours:
            raise AssertionError(f"{name}: the extension has {layout[name]}, this package {ours}")
    return {kind: number for number, kind in enumerate(layout["kinds"])}


def _kind(op: Op) -> str:
    """The extension's name: activations and gates are known by their variant."""
    return op.variant if op.kind in ("activation", "gate") else op.kind


class PlanTables:
    """Operations and terms of a plan, as the extension reads them.

    Attributes:
        ops: array of `OP`. Those of the plan come first; others follow that copy keys to their cache.
        terms: array of `TERM`.
        key_stores: the operation that copies the keys of another one, by that one's index.

    Args:
        above: with what is done before the steps of a row or tile; else the step phase alone.

    The addresses in the tables are those of copies of the weights, which live until `release`.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, plan: Plan, *, above: bool) -> None:
        require_finite(plan)
        self.plan = plan
        self.key_stores: dict[int, int] = {}
        self._kinds = kind_numbers()
        self._weights: list[Tensor] = []
        self._paired = paired_ops(plan)
        self._terms: list[tuple[int, ...]] = []
        for op in plan.ops:
            if op.kind == "attention":
                self.key_stores[op.sources[1]] = len(plan.ops) + len(self.key_stores)
        self.ops = np.zeros(len(plan.ops) + len(self.key_stores), dtype=OP)
        levels = above_levels(plan) if above else {}
        for op in plan.ops:
            row = self.ops[op.index]
            self._begin(row, _kind(op), op.index, op.sources)
            row["above_level"] = levels.get(op.index, -1)
            self._step_part(row, op)
            if above:
                self._above_part(row, op)
        for key, index in self.key_stores.items():
            self._begin(self.ops[index], "store_keys", key, (key,))
            self.ops[index]["above_level"] = -1
        self.terms = np.array(self._terms, dtype=TERM)

    def _begin(self, row: np.void, kind: str, index: int, sources: tuple[int, ...]) -> None:
        row["kind"], row["channels"] = self._kinds[kind], self.plan.ops[index].channels
        row["level"], row["paired"] = self.plan.level[index], index in self._paired
        row["sources"] = (*sources, -1, -1, -1)[:3]

    def _step_part(self, row: np.void, op: Op) -> None:
        if self.plan.level[op.index] < 0:
            return
        if op.kind == "attention":
            query, key, value = op.sources
            row["sources"], row["paired"] = (query, self.key_stores[key], value), False
            row["heads"], row["inclusive"] = op.heads, op.variant == "inclusive"
        elif op.kind == "affine":
            row["first_term"], row["num_terms"] = self._add(self.plan.step_terms[op.index])
        elif op.kind == "lookup":
            assert op.weight is not None
            table = op.weight[[index for index, (dr, _) in enumerate(op.taps) if dr == 0]]
            row["num_taps"], row["weights"], row["num_weights"] = len(table), self._address(table), table.numel()

    def _above_part(self, row: np.void, op: Op) -> None:
        row["uniform"] = op.index in self.plan.uniform
        if op.bias is not None:
            row["bias"] = self._address(op.bias)
        if op.kind == "affine":
            once, above = above_terms(self.plan, op)
            row["first_once"], row["num_once"] = self._add(once)
            row["first_above"], row["num_above"] = self._add(above)
        elif op.kind == "lookup":
            assert op.weight is not None
            taps = [Term(-1, (tap,), table[None]) for tap, table in zip(op.taps, op.weight, strict=True) if tap[0] < 0]
            row["first_above"], row["num_above"] = self._add(taps)

    def _add(self, terms: Sequence[Term]) -> tuple[int, int]:
        """Index of the first, and how many."""
        first = len(self._terms)
        for term in terms:
            rows, columns = [dr for dr, _ in term.taps], [dc for _, dc in term.taps]
            height, width = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
            if height * width != len(term.taps):
                raise AssertionError(f"taps {term.taps} do not fill a rectangle")
            weights = self._address(term.weight)
            self._terms.append((term.source, min(columns), width, weights, term.weight.numel(), min(rows), height))
        return first, len(terms)

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """What the extension's functions that pack a plan begin with: tables, and the output."""
        ops = array_address("ops", self.ops, OP, len(self.ops))
        terms = array_address("terms", self.terms, TERM, len(self.terms))
        return ops, len(self.ops), terms, len(self.terms), self.plan.output

    def release(self) -> None:
        """Let go of the copies of the weights: the addresses of weights lead nowhere from now on."""
        self._weights.clear()

    def _address(self, weight: Tensor) -> int:
        weight = weight.detach().float().cpu().contiguous()
        self._weights.append(weight)
        return address("weight", weight, torch.float32, weight.numel())


def above_terms(plan: Plan, op: Op) -> tuple[list[Term], list[Term]]:
    """The terms of an affine operation before its steps: those that are the same at all positions, and the others."""
    once = [term for term in plan.row_terms[op.index] if term.source in plan.uniform]
    return once, [term for term in plan.row_terms[op.index] if term.source not in plan.uniform]


def above_levels(plan: Plan) -> dict[int, int]:
    """In which order operations are worked out before the steps of a tile, of those that have such a part."""
    levels: dict[int, int] = {}
    for op in plan.ops:
        if op.kind in ("static", "attention") or op.index in plan.uniform:
            continue
        if op.kind == "affine":
            terms = above_terms(plan, op)[1]
            waits = {term.source for term in terms if any(dr == 0 for dr, _ in term.taps)}
            needed = bool(terms)
        else:
            waits = set(op.sources)
            needed = plan.level[op.index] < 0 or any(dr < 0 for dr, _ in op.taps)
        if needed or plan.level[op.index] < 0:
            levels[op.index] = max((levels[source] + 1 for source in waits if source in levels), default=0)
    return levels


def plan_sizes(plan: Plan, batch: int) -> tuple[int, ...]:
    """Sizes that follow the tables of the step phase: batch, width, positions, codes, and the stride of keys."""
    height, width = plan.shape
    return batch, width, height * width, plan.num_codes, padded(height * width)


def paired_ops(plan: Plan) -> set[int]:
    """Operations whose two halves have to be split alike, because a gate reads them together."""
    paired: set[int] = set()
    for op in reversed(plan.ops):
        if op.kind == "gate":
            paired.add(op.sources[0])
        elif op.variant == "concat_elu":
            paired.add(op.index)
        elif op.index in paired and op.kind in ("add", "activation"):
            paired.update(op.sources)
    for op in plan.ops:
        plain = op.kind in ("add", "activation") and (op.index not in paired or op.variant == "concat_elu")
        if plain and plan.level[op.index] >= 0 and any(source in paired for source in op.sources):
            raise UnavailableError("this plan reads a vector both in halves and whole within one level")
    return paired


def make_scratch(state: RowState, places: int) -> dict[int, Tensor]:
    """Room [places, B, C] for the current position of every operation whose past is not kept."""
    kept = {*state.plan.history, *state.values}
    device = state.device
    return {
        op.index: torch.empty(places, state.batch, op.channels, dtype=torch.float32, device=device)
        for op in state.plan.step_ops()
        if op.index not in kept
    }


def fill_views(
    views: np.ndarray, tables: PlanTables, state: RowState, scratch: dict[int, Tensor], row: int
) -> list[Tensor]:
    """Write where each operation finds its values and its starts in a row that has begun.

    Args:
        views: int64 [2, operations, 4], values and then starts: address, and in floats the strides of samples and
            columns, and the mask that is applied to the column before the latter.

    Returns:
        The tensors among them that belong to this row alone, to be kept until the row has been computed.
    """
    views.fill(0)
    values, starts = views
    kept: list[Tensor] = []
    plan, batch, width = tables.plan, state.batch, state.width
    device, positions = state.device, plan.shape[0] * plan.shape[1]

    def first(name: str, tensor: Tensor, sizes: tuple[int, ...], *place: int) -> int:
        """Address of the vector of the first sample at a place."""
        found = address(name, tensor, torch.float32, math.prod(sizes), device)
        offset = sum(index * stride for index, stride in zip(place, tensor.stride()[1:], strict=False))
        return found + offset * tensor.element_size()

    for op in plan.ops:
        if plan.level[op.index] < 0:
            values[op.index] = _row_view(state, op, kept)
            continue
        if op.kind in ("affine", "lookup"):
            starts[op.index] = _row_view(state, op, kept)
        if op.index in plan.history:
            cache = state.cache_row(op.index)
            found = strided_address("cache", cache, torch.float32, (batch, width, op.channels), device)
            values[op.index] = (found, cache.stride(0), cache.stride(1), EVERY_COLUMN)
        elif op.index in state.values:
            cache = state.values[op.index]
            found = first("values", cache, (batch, positions, op.channels), row * width)
            values[op.index] = (found, cache.stride(0), cache.stride(1), EVERY_COLUMN)
        else:
            place = scratch[op.index]
            mask, stride = (SAME, 0) if len(place) == 1 else (IN_TURN, place.stride(0))
            found = first("scratch", place, (len(place), batch, op.channels))
            values[op.index] = (found, place.stride(1), stride, mask)
    for key, index in tables.key_stores.items():
        cache = state.keys[key]
        found = first("keys", cache, (batch, plan.ops[key].channels, padded(positions)))
        values[index] = (found, cache.stride(0), 0, SAME)
    return kept


def fill_all_views(views: np.ndarray, tables: PlanTables, state: SteadyState, scratch: dict[int, Tensor]) -> None:
    """`fill_views` of every row, before the first one: int64 [H, 2, operations, 4]."""
    height = len(views)
    for row in range(min(2, height)):
        state.go_to(row)
        fill_views(views[row], tables, state, scratch, row)
    if height == 1:
        return
    further = views[1, :, :, 0] - views[0, :, :, 0]
    views[2:] = views[0]
    turns = np.full((2, len(tables.ops)), height)
    for index in state.plan.history:
        if state.plan.level[index] >= 0:
            turns[0, index] = state.cached_rows(index)
    views[:, :, :, 0] = views[0, :, :, 0] + np.arange(height)[:, None, None] % turns * further


def _row_view(state: RowState, op: Op, kept: list[Tensor]) -> tuple[int, int, int, int]:
    rows = state.rows.get(op.index)
    if rows is None:
        return 0, 0, 0, 0  # nothing reads it
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    kept.append(rows)
    columns = 1 if rows.shape[1] == 1 else state.width
    sizes = (state.batch, columns, op.channels)
    found = strided_address("row", rows, torch.float32, sizes, state.device)
    stride, mask = (rows.stride(1), EVERY_COLUMN) if columns > 1 else (0, SAME)
    return found, rows.stride(0), stride, mask


def logits_view(state: RowState, logits: Tensor, row: int) -> tuple[int, int, int, int]:
    """The view of the output where the logits [B, H, W, K] of all positions are wanted."""
    sizes = (state.batch, *state.plan.shape, state.plan.num_codes)
    found = strided_address("logits", logits, torch.float32, sizes, state.device)
    found += row * logits.stride(1) * logits.element_size()
    return found, logits.stride(0), logits.stride(2), EVERY_COLUMN


def row_arguments(
    state: RowState, noise: Tensor, known: Tensor, settings: Settings, row: int
) -> tuple[int | float, ...]:
    """What both engines draw a row by: its codes, uniform numbers and known places by address, and the settings."""
    grids: list[int] = []
    for name, grid, dtype in (
        ("codes", state.codes, torch.int64),
        ("noise", noise, torch.float32),
        ("known", known, torch.bool),
    ):
        sizes = (state.batch, state.width)
        grids += [strided_address(name, grid[:, row], dtype, sizes, state.device), grid.stride(0)]
    return (*grids, *settings.numbers(state.plan.num_codes))


def not_drawable(sample: int, row: int, column: int) -> ArgumentError:
    return ArgumentError(
        f"prior: its logits are not finite for sample {sample} of the micro-batch at row {row}, column {column}"
    )


@contextlib.contextmanager
def refused_options() -> Iterator[None]:
    """What the extension refuses are arguments: the same error as for those refused here."""
    try:
        yield
    except ValueError as error:
        raise ArgumentError(str(error)) from error
