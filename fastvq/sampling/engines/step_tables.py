"""What the compiled engines are handed: a plan's step phase as tables of numbers, and where its vectors lie."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastvq._memory import address, array_address, strided_address
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.sampling.engines.state import GridState, padded, ring_rows
from fastvq.sampling.plan.form import Op, Plan, require_finite
from fastvq.sampling.request import Settings

OP_FIELDS, TERM_FIELDS, VIEW_FIELDS = 14, 5, 4

# Numbers of the extension's operations.
_KINDS = {"lookup": 0, "affine": 1, "elu": 2, "concat_elu": 3, "relu": 4, "add": 5, "glu": 6, "tanh": 7}
_STORE_KEYS, _ATTEND = 8, 9

# Column masks of views: vectors of every column, two places in turn for the current column, one for all columns.
EVERY_COLUMN, IN_TURN, SAME = -1, 1, 0


class StepTables:
    """Operations and terms of a plan's step phase, as the extension reads them.

    Attributes:
        ops: int64 [operations, 14]. Those of the plan come first; others follow that copy keys to their cache.
        terms: int64 [terms, 5].
        key_stores: the operation that copies the keys of another one, by that one's index.

    The addresses in the tables are those of copies of the weights, which live until `release`.

    Raises:
        ArgumentError: weights that are not finite.
    """

    def __init__(self, plan: Plan) -> None:
        require_finite(plan)
        self.plan = plan
        self.key_stores: dict[int, int] = {}
        self._weights: list[Tensor] = []
        paired = paired_ops(plan)
        terms: list[list[int]] = []
        for op in plan.ops:
            if op.kind == "attention":
                self.key_stores[op.sources[1]] = len(plan.ops) + len(self.key_stores)
        ops = [self._row(op, op.index in paired, terms) for op in plan.ops]
        ops += [
            _plain_row(_STORE_KEYS, plan.ops[key].channels, plan.level[key], key in paired, [key])
            for key in self.key_stores
        ]
        self.ops = np.array(ops, dtype=np.int64)
        self.terms = np.array(terms, dtype=np.int64).reshape(-1, TERM_FIELDS)

    def _row(self, op: Op, paired: bool, terms: list[list[int]]) -> list[int]:
        plan = self.plan
        level = plan.level[op.index]
        # Row work never runs in the extension, so its kind does not matter there.
        kind = _KINDS.get(op.kind, _KINDS.get(op.variant, 0))
        row = _plain_row(kind, op.channels, level, paired, [*op.sources])
        if level < 0:
            return row
        if op.kind == "attention":
            query, key, value = op.sources
            row = _plain_row(_ATTEND, op.channels, level, False, [query, self.key_stores[key], value])
            row[7], row[8] = op.heads, int(op.variant == "inclusive")
        elif op.kind == "affine":
            row[9], row[10] = len(terms), len(plan.step_terms[op.index])
            terms += [
                [term.source, term.taps[0][1], len(term.taps), self._address(term.weight), term.weight.numel()]
                for term in plan.step_terms[op.index]
            ]
        elif op.kind == "lookup":
            assert op.weight is not None
            current = [index for index, (dr, _) in enumerate(op.taps) if dr == 0]
            table = op.weight[current]
            row[11], row[12], row[13] = len(current), self._address(table), table.numel()
        return row

    def plan_arguments(self, batch: int) -> tuple[int, ...]:
        """What the extension's functions that pack a plan begin with: tables, output, sizes."""
        height, width = self.plan.shape
        positions = height * width
        ops = array_address("ops", self.ops, np.int64, len(self.ops) * OP_FIELDS)
        terms = array_address("terms", self.terms, np.int64, len(self.terms) * TERM_FIELDS)
        tables = (ops, len(self.ops), terms, len(self.terms))
        return *tables, self.plan.output, batch, width, positions, self.plan.num_codes, padded(positions)

    def release(self) -> None:
        """Let go of the copies of the weights: the addresses of weights lead nowhere from now on."""
        self._weights.clear()

    def _address(self, weight: Tensor) -> int:
        weight = weight.detach().float().cpu().contiguous()
        self._weights.append(weight)
        return address("weight", weight, torch.float32, weight.numel())


def _plain_row(kind: int, channels: int, level: int, paired: bool, sources: list[int]) -> list[int]:
    return [kind, channels, level, int(paired), *(sources + [-1] * 3)[:3], 0, 0, 0, 0, 0, 0, 0]


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


def make_scratch(state: GridState, places: int) -> dict[int, Tensor]:
    """Room [places, B, C] for the current position of every operation whose past is not kept."""
    kept = {*state.rings, *state.values}
    device = state.compiled.device
    return {
        op.index: torch.empty(places, state.batch, op.channels, dtype=torch.float32, device=device)
        for op in state.plan.step_ops()
        if op.index not in kept
    }


def fill_views(
    views: np.ndarray, tables: StepTables, state: GridState, scratch: dict[int, Tensor], row: int
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
    device, positions = state.compiled.device, plan.shape[0] * plan.shape[1]

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
        if op.index in state.rings:
            data, ring, past = state.rings[op.index].data, state.rings[op.index], plan.history[op.index]
            sizes = (batch, ring_rows(past), past.left + width + past.right, op.channels)
            found = first("ring", data, sizes, ring.slot, ring.left)
            values[op.index] = (found, data.stride(0), data.stride(2), EVERY_COLUMN)
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


def _row_view(state: GridState, op: Op, kept: list[Tensor]) -> tuple[int, int, int, int]:
    rows = state.rows[op.index]
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    kept.append(rows)
    columns = 1 if rows.shape[1] == 1 else state.width
    sizes = (state.batch, columns, op.channels)
    found = strided_address("row", rows, torch.float32, sizes, state.compiled.device)
    stride, mask = (rows.stride(1), EVERY_COLUMN) if columns > 1 else (0, SAME)
    return found, rows.stride(0), stride, mask


def logits_view(state: GridState, logits: Tensor, row: int) -> tuple[int, int, int, int]:
    """The view of the output where the logits [B, H, W, K] of all positions are wanted."""
    sizes = (state.batch, *state.plan.shape, state.plan.num_codes)
    found = strided_address("logits", logits, torch.float32, sizes, state.compiled.device)
    found += row * logits.stride(1) * logits.element_size()
    return found, logits.stride(0), logits.stride(2), EVERY_COLUMN


def row_arguments(
    state: GridState, noise: Tensor, known: Tensor, settings: Settings, row: int
) -> tuple[int | float, ...]:
    """What both engines draw a row by: its codes, uniform numbers and known places by address, and the settings."""
    num_codes = state.plan.num_codes
    grids: list[int] = []
    for name, grid, dtype in (
        ("codes", state.codes, torch.int64),
        ("noise", noise, torch.float32),
        ("known", known, torch.bool),
    ):
        sizes = (state.batch, state.width)
        grids += [strided_address(name, grid[:, row], dtype, sizes, state.compiled.device), grid.stride(0)]
    return (
        *grids,
        settings.temperature,
        num_codes if settings.top_k is None else settings.top_k,
        1.0 if settings.top_p is None else settings.top_p,
    )


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
