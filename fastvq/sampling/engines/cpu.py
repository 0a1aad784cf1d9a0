"""The cached sampler in C++: one call fills the grids of a micro-batch, draws included.

Every output of a product is summed in one fixed order, and so is everything else: the codes of a sample depend neither
on the samples beside it, nor on tiles or threads; and processors that fuse products with sums give the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import address, array_address, strided_address
from fastvq._nvtx import annotate
from fastvq.errors import ArgumentError
from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone, Schedule
from fastvq.sampling.engines.context import fixed_statics
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.engines.prepared import Kept, prepared
from fastvq.sampling.engines.state import padded, weight_bytes
from fastvq.sampling.engines.step_tables import STATIC, PlanTables, above_terms, not_drawable, refused_options
from fastvq.sampling.engines.tiles import best_front
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan, static_places
from fastvq.sampling.plan.front import Front
from fastvq.sampling.request import SampleRequest

# A few tenths of a microsecond of one core's arithmetic, as long as a meeting of two threads takes.
_FLOPS_PER_MEETING = 8_000

_NEEDED = {"avx512": {"avx512f", "avx512bw"}, "avx2": {"avx2", "fma"}}


class CpuPlan:
    """A plan packed for an instruction set.

    Args:
        kernels: ``auto``, or ``avx512``, ``avx2``, ``baseline`` to force one.
        bf16: keep weights in bfloat16 (sums stay in float32): half the memory traffic, not exact.

    Raises:
        ArgumentError: settings that the extension does not have here, or weights that are not finite.
    """

    def __init__(self, plan: Plan, *, kernels: str = "auto", bf16: bool = False) -> None:
        self.plan = plan
        tables = PlanTables(plan, above=True)
        with refused_options():
            self.native = _engine.require().make_grid_plan(
                *tables.addresses, *plan.shape, plan.num_codes, bf16, kernels
            )
        tables.release()  # the extension has packed them
        self._entries = len(tables.ops)

    def memory(self, batch: int, front: Front) -> int:
        """Bytes that filling the grids of a micro-batch takes beside the weights."""
        return self.native.memory_bytes(batch, front.tile, front.offset)

    def fill(
        self,
        request: SampleRequest,
        statics: dict[str, Tensor],
        front: Front,
        row_done: RowDone,
        *,
        threads: int,
        logits: Tensor | None = None,
        on_phase: OnPhase | None = None,
    ) -> Tensor:
        """Fill the grids of a request: int64 [n, H, W].

        Args:
            statics: what is known beforehand, see :meth:`fastvq.models.Prior.statics`.
            logits: float32 [n, H, W, K], to receive those of all positions.
        """
        batch = len(request.noise)
        grid = (batch, *self.plan.shape)
        codes = request.start_codes().contiguous()
        noise, known, settings = request.noise.contiguous(), request.known.contiguous(), request.settings
        count = codes.numel()
        inputs, kept = self._static_inputs(statics, batch)
        with annotate("grid"):
            bad, above, steps = self.native.run(
                batch,
                front.tile,
                front.offset,
                threads,
                step_threads(self.plan, batch * front.rows, threads),
                array_address("statics", inputs, STATIC, self._entries),
                address("codes", codes, torch.int64, count),
                address("noise", noise, torch.float32, count),
                address("known", known, torch.bool, count),
                0 if logits is None else strided_address("logits", logits, torch.float32, (*grid, self.plan.num_codes)),
                *settings.numbers(self.plan.num_codes),
                lambda rows: row_done(rows, codes),
            )
        kept.clear()  # until here the extension has read them
        if bad is not None:
            raise not_drawable(*bad)
        if on_phase is not None:
            on_phase("row phase", above)
            on_phase("step phase", steps)
        return codes

    def _static_inputs(self, statics: dict[str, Tensor], batch: int) -> tuple[np.ndarray, list[Tensor]]:
        """Where static operations find their values, by operation, and the tensors that these are in."""
        inputs = np.zeros(self._entries, dtype=STATIC)
        kept = []
        for op in self.plan.ops:
            if op.kind != "static":
                continue
            features = statics[op.variant].permute(0, 2, 3, 1).contiguous()  # [B or 1, H or 1, W or 1, C]
            places = zip(features.shape[:3], (batch, *self.plan.shape), features.stride()[:3], strict=True)
            sizes, strides = zip(
                *[(1, 0) if size == 1 else (whole, stride) for size, whole, stride in places], strict=True
            )
            data = strided_address(op.variant, features, torch.float32, (*sizes, op.channels))
            inputs[op.index] = (data, *strides)
            kept.append(features)
        return inputs, kept


def require_kernels(name: str) -> None:
    """
    Raises:
        ArgumentError: the processor lacks an instruction set that these kernels need.
    """
    if name not in _NEEDED:
        return
    missing = _NEEDED[name] - set(_engine.require().build_info()["instruction_sets"])
    if missing:
        raise ArgumentError(f"kernels: {name!r} was asked for, but this processor lacks {', '.join(sorted(missing))}")


def step_threads(plan: Plan, positions: int, available: int) -> int:
    """Threads that have enough to do between two meetings to be worth meeting, with so many positions at a time."""
    products = sum(term.weight.numel() for terms in plan.step_terms.values() for term in terms)
    return max(1, min(available, 2 * products * positions // (plan.num_levels * _FLOPS_PER_MEETING)))


def grid_bytes(plan: Plan, front: Front) -> int:
    """Bytes per sample that filling grids takes beside the weights."""
    (height, width), floats = plan.shape, 0
    values = {op.sources[2] for op in plan.ops if op.kind == "attention"}
    for op in plan.ops:
        history, step = plan.history.get(op.index), plan.level[op.index] >= 0
        if op.kind == "static":
            floats += op.channels * static_places(op, height * width)
        elif op.index in plan.uniform:
            floats += op.channels
        elif history is not None:
            window = history.left + 1 + history.right
            span = (front.offset * history.above + 1) * front.tile + history.left + history.right
            whole = width + history.left + history.right
            pitch = whole if front.tiles == 1 else min(whole, span + window - 1)
            floats += op.channels * ((front.rows + history.above) * pitch + window)
        elif op.index in values:
            floats += op.channels * height * width
        else:
            floats += op.channels * front.rows * (1 if step else front.tile)
        once, above = above_terms(plan, op) if op.kind == "affine" else ([], [])
        if op.index not in plan.uniform and once:
            floats += op.channels
        if step and (above or any(dr < 0 for dr, _ in op.taps)):
            floats += op.channels * front.rows * front.tile
        if op.kind == "attention":
            floats += padded(height * width) * plan.ops[op.sources[1]].channels
    return torch.float32.itemsize * floats + torch.int64.itemsize * height * width


_Packed = tuple[CpuPlan, Front, int, Kept]


class CpuEngine(Engine[_Packed]):
    name = "cpu"
    precisions = ("float32", "bfloat16")
    plans = True
    exact = True
    tiles = True

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it computes on the CPU, the prior is on {device}"
        return _engine.why_unavailable()

    def check(self, options: EngineOptions, device: torch.device | None = None) -> None:
        super().check(options, device)
        if device is not None:
            require_kernels(options.kernels)

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        threads = options.threads or torch.get_num_threads()
        key = (self.name, batch, threads, options.tile, options.precision)
        # To compare fronts takes as long as small grids do.
        if key not in plan.remembered:
            plan.remembered[key] = self._schedule(plan, batch, threads, options)
        found: Schedule = plan.remembered[key]
        return found

    def _schedule(self, plan: Plan, batch: int, threads: int, options: EngineOptions) -> Schedule:
        element = 2 if options.precision == "bfloat16" else 4
        if options.tile is None:
            front, reason = best_front(plan, batch, threads, element, lambda front: grid_bytes(plan, front))
        else:
            front, reason = plan.front(options.tile), "asked for"
        weights = weight_bytes(plan, element) + torch.float32.itemsize * plan.context_weights
        return Schedule(front, reason, weights, batch * grid_bytes(plan, front))

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        front = self.schedule(kept.plan, batch, options).front
        kernels, bf16 = options.kernels, options.precision == "bfloat16"
        packed = kept.get(self.name, (kernels, bf16), lambda: CpuPlan(kept.plan, kernels=kernels, bf16=bf16))
        return packed, front, options.threads or torch.get_num_threads(), kept

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        plan, front, threads, kept = prepared
        statics = fixed_statics(prior, request, kept)
        return plan.fill(request, statics, front, row_done, threads=threads, on_phase=on_phase)
