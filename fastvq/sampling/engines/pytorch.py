"""The cached sampler in PyTorch: the plan, interpreted. It is what the compiled engines are read against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone, Schedule
from fastvq.sampling.engines.phases import OnPhase, Phases
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.engines.state import CompiledPlan, GridState, cache_bytes, elementwise, static_inputs, weight_bytes
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Op, Plan, require_finite
from fastvq.sampling.plan.front import raster
from fastvq.sampling.request import SampleRequest


class TorchStep:
    """The step phase: one position after the other, level by level."""

    def __init__(self, compiled: CompiledPlan) -> None:
        self.plan = compiled.plan
        require_finite(self.plan)
        self.steps = list(self.plan.step_ops())
        self.weights = {
            index: [term.weight.flatten(0, 1).to(compiled.device) for term in terms]
            for index, terms in self.plan.step_terms.items()
        }
        self.tables = {op.index: op.weight.to(compiled.device) for op in self.steps if op.weight is not None}

    def logits(self, state: GridState, row: int, column: int) -> Tensor:
        """Logits [B, K] at a position, everything before it being known."""
        values: dict[int, Tensor] = {}
        for op in self.steps:
            value = self._value(op, state, values, row, column)
            values[op.index] = value
            if op.index in state.rings:
                ring = state.rings[op.index]
                ring.data[:, ring.slot, ring.left + column] = value
            if op.index in state.keys:
                state.keys[op.index][:, :, row * state.width + column] = value
            if op.index in state.values:
                state.values[op.index][:, row * state.width + column] = value
        return values[self.plan.output]

    def _value(self, op: Op, state: GridState, values: dict[int, Tensor], row: int, column: int) -> Tensor:
        def here(source: int) -> Tensor:
            if source in values:
                return values[source]
            known = state.rows[source]
            return known[:, column if known.shape[1] > 1 else 0]

        if op.kind == "lookup":
            total = here_start(state.rows[op.index], column)
            for tap, (dr, dc) in enumerate(op.taps):
                if dr == 0 and column + dc >= 0:
                    total = total + self.tables[op.index][tap][state.codes[:, row, column + dc]]
            return total
        if op.kind == "affine":
            total = here_start(state.rows[op.index], column)
            for term, weight in zip(self.plan.step_terms[op.index], self.weights[op.index], strict=True):
                if set(term.taps) == {(0, 0)}:
                    total = total + here(term.source) @ weight
                else:
                    ring = state.rings[term.source]
                    first = ring.left + column + term.taps[0][1]
                    window = ring.data[:, ring.slot, first : first + len(term.taps)]
                    total = total + window.flatten(1) @ weight
            return total
        if op.kind == "attention":
            return _attend(op, state, values, row * state.width + column)
        return elementwise(op, [here(source) for source in op.sources])


def here_start(rows: Tensor, column: int) -> Tensor:
    return rows[:, column if rows.shape[1] > 1 else 0]


def _attend(op: Op, state: GridState, values: dict[int, Tensor], position: int) -> Tensor:
    query, key, value = op.sources
    count = position + (op.variant == "inclusive")
    if count == 0:
        return torch.zeros_like(state.values[value][:, 0])
    q = values[query].unflatten(1, (op.heads, 1, -1))  # [B, heads, 1, D]
    k = state.keys[key][:, :, :count].unflatten(1, (op.heads, -1)).transpose(2, 3)  # [B, heads, N, D]
    v = state.values[value][:, :count].unflatten(2, (op.heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


def sample_torch(
    compiled: CompiledPlan,
    step: TorchStep,
    state: GridState,
    request: SampleRequest,
    row_done: RowDone,
    on_phase: OnPhase | None = None,
) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]."""
    height, width = compiled.plan.shape
    phases = Phases(on_phase, compiled.device)
    state.codes.copy_(request.start_codes())
    for row in range(height):
        with phases.phase("row phase"):
            state.begin_row(row)
        with phases.phase("step phase"):
            for column in range(width):
                request.draw_into(state.codes, step.logits(state, row, column), row, column)
        row_done()
    phases.finish()
    return state.codes


_Packed = tuple[CompiledPlan, TorchStep]


class TorchEngine(Engine[_Packed]):
    name = "torch"
    plans = True

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        return Schedule(raster(plan.shape), "x", weight_bytes(plan), batch * cache_bytes(plan, places=1))

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        compiled = kept.compiled(options.row_kernel or self.row_kernel)
        return compiled, kept.get(self.name, None, lambda: TorchStep(compiled))

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        compiled, step = prepared
        state = GridState(compiled, len(request.noise), static_inputs(prior, request))
        return sample_torch(compiled, step, state, request, row_done, on_phase)
