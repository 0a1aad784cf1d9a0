"""The cached sampler with its step phase in C++: one call fills a row, draws included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastvq import _engine
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.sampling.plan import Op, Plan, require_finite
from fastvq.sampling.request import SampleRequest
from fastvq.sampling.state import CompiledPlan, GridState, padded

# Numbers of csrc/cpu/step_plan.h.
_KINDS = {"lookup": 0, "affine": 1, "elu": 2, "concat_elu": 3, "relu": 4, "add": 5, "glu": 6, "tanh": 7}
_STORE_KEYS, _ATTEND = 8, 9

# About 2 microseconds of one core's arithmetic; a meeting of two threads takes a few tenths of one.
_FLOPS_PER_MEETING = 100_000


class CpuStep:
    """A plan packed for a number of samples, threads and an instruction set.

    Args:
        kernels: ``auto``, or ``avx512``, ``avx2``, ``baseline`` to force one.
        bf16: keep weights in bfloat16 (sums stay in float32): half the memory traffic, not exact.
    """

    def __init__(self, plan: Plan, batch: int, *, threads: int, kernels: str = "auto", bf16: bool = False) -> None:
        extension = _engine.require()
        require_finite(plan)
        self.plan, self.batch = plan, batch
        height, width = plan.shape
        self._tensors: list[Tensor] = []  # kept while the extension copies them
        self.key_stores: dict[int, int] = {}
        ops, terms = self._tables()
        self.num_ops = len(ops)
        op_table, term_table = np.array(ops, dtype=np.int64), np.array(terms, dtype=np.int64).reshape(-1, 5)
        self.native = extension.make_step_plan(
            op_table.ctypes.data,
            len(ops),
            term_table.ctypes.data,
            len(terms),
            plan.output,
            batch,
            width,
            height * width,
            plan.num_codes,
            padded(height * width),
            bf16,
            threads,
            kernels,
        )
        self._tensors.clear()

    def _tables(self) -> tuple[list[list[int]], list[list[int]]]:
        plan = self.plan
        paired = paired_ops(plan)
        ops: list[list[int]] = []
        terms: list[list[int]] = []
        # Keys are copied to their cache by operations of their own, which come after those of the plan.
        for op in plan.ops:
            if op.kind == "attention":
                self.key_stores[op.sources[1]] = len(plan.ops) + len(self.key_stores)
        for op in plan.ops:
            level = plan.level[op.index]
            row = self._row(_kind(op), op.channels, level, op.index in paired, [*op.sources])
            if level >= 0 and op.kind == "attention":
                query, key, value = op.sources
                row = self._row(_ATTEND, op.channels, level, False, [query, self.key_stores[key], value])
                row[7], row[8] = op.heads, int(op.variant == "inclusive")
            elif level >= 0 and op.kind == "affine":
                row[9], row[10] = len(terms), len(plan.step_terms[op.index])
                terms += [
                    [term.source, term.taps[0][1], len(term.taps), self._address(term.weight), term.weight.numel()]
                    for term in plan.step_terms[op.index]
                ]
            elif level >= 0 and op.kind == "lookup":
                assert op.weight is not None
                current = [index for index, (dr, _) in enumerate(op.taps) if dr == 0]
                table = op.weight[current]
                row[11], row[12], row[13] = len(current), self._address(table), table.numel()
            ops.append(row)
        ops += [
            self._row(_STORE_KEYS, plan.ops[key].channels, plan.level[key], key in paired, [key])
            for key in self.key_stores
        ]
        return ops, terms

    @staticmethod
    def _row(kind: int, channels: int, level: int, paired: bool, sources: list[int]) -> list[int]:
        return [kind, channels, level, int(paired), *(sources + [-1] * 3)[:3], 0, 0, 0, 0, 0, 0, 0]

    def _address(self, weight: Tensor) -> int:
        weight = weight.detach().float().cpu().contiguous()
        self._tensors.append(weight)
        return weight.data_ptr()


def _kind(op: Op) -> int:
    # Row work never runs in the extension, so its kind does not matter there.
    return _KINDS.get(op.kind, _KINDS.get(op.variant, 0))


def useful_threads(plan: Plan, batch: int, available: int) -> int:
    """Threads that have enough to do between two meetings to be worth meeting. Results do not depend on it."""
    products = sum(term.weight.numel() for terms in plan.step_terms.values() for term in terms)
    return max(1, min(available, 2 * products * batch // (plan.num_levels * _FLOPS_PER_MEETING)))


def paired_ops(plan: Plan) -> set[int]:
    """Operations whose two halves have to be split between threads alike, because a gate reads them together."""
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


def sample_cpu(
    compiled: CompiledPlan,
    step: CpuStep,
    state: GridState,
    request: SampleRequest,
    row_done: Callable[[], None],
    logits: Tensor | None = None,
) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]. ``logits`` [n, H, W, K] receives those of all positions."""
    plan = compiled.plan
    height, width = plan.shape
    settings = request.settings
    state.codes.copy_(request.start_codes())
    noise, known = request.noise.contiguous(), request.known.contiguous()
    scratch = _scratch(step, state)
    for row in range(height):
        state.begin_row(row)
        kept: list[Tensor] = []
        values, starts = _views(step, state, scratch, row, kept)
        if logits is not None:
            values[plan.output] = (logits[:, row].data_ptr(), logits.stride(0), logits.stride(2))
        bad = step.native.run_row(
            row,
            values.ctypes.data,
            starts.ctypes.data,
            state.codes[:, row].data_ptr(),
            state.codes.stride(0),
            noise[:, row].data_ptr(),
            noise.stride(0),
            known[:, row].data_ptr(),
            known.stride(0),
            settings.temperature,
            plan.num_codes if settings.top_k is None else settings.top_k,
            1.0 if settings.top_p is None else settings.top_p,
        )
        kept.clear()  # the next row's values are worked out before these names are bound again
        if bad >= 0:
            sample, column = divmod(bad, width)
            raise ArgumentError(
                f"prior: its logits are not finite for sample {sample} of the micro-batch at row {row}, column {column}"
            )
        row_done()
    return state.codes


def _scratch(step: CpuStep, state: GridState) -> dict[int, Tensor]:
    """Room for the current position of every operation whose past is not kept."""
    plan = step.plan
    kept = {*state.rings, *state.values}
    return {op.index: torch.empty(state.batch, op.channels) for op in plan.step_ops() if op.index not in kept}


def _views(
    step: CpuStep, state: GridState, scratch: dict[int, Tensor], row: int, kept: list[Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Where each operation finds its values and starts in this row: (address, batch stride, column stride)."""
    values = np.zeros((step.num_ops, 3), dtype=np.int64)
    starts = np.zeros((step.num_ops, 3), dtype=np.int64)
    plan = step.plan
    for op in plan.ops:
        if plan.level[op.index] < 0:
            values[op.index] = _row_view(state.rows[op.index], kept)
            continue
        if op.kind in ("affine", "lookup"):
            starts[op.index] = _row_view(state.rows[op.index], kept)
        if op.index in state.rings:
            ring = state.rings[op.index]
            first = ring.data[:, ring.slot, ring.left]
            values[op.index] = (first.data_ptr(), ring.data.stride(0), ring.data.stride(2))
        elif op.index in state.values:
            cache = state.values[op.index]
            values[op.index] = (cache[:, row * state.width].data_ptr(), cache.stride(0), cache.stride(1))
        else:
            place = scratch[op.index]
            values[op.index] = (place.data_ptr(), place.stride(0), 0)
    for key, index in step.key_stores.items():
        cache = state.keys[key]
        values[index] = (cache.data_ptr(), cache.stride(0), 0)
    return values, starts


def _row_view(rows: Tensor, kept: list[Tensor]) -> tuple[int, int, int]:
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    kept.append(rows)
    return rows.data_ptr(), rows.stride(0), rows.stride(1) if rows.shape[1] > 1 else 0
