"""The cached sampler with its step phase in C++: one call fills a row, draws included."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvq import _engine
from fastvq._memory import array_address
from fastvq.errors import ArgumentError
from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone
from fastvq.sampling.engines.phases import OnPhase, Phases
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.engines.state import CompiledPlan, GridState, static_inputs
from fastvq.sampling.engines.step_tables import (
    VIEW_FIELDS,
    StepTables,
    fill_views,
    logits_view,
    make_scratch,
    not_drawable,
    refused_options,
    row_arguments,
)
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.request import SampleRequest

# About 2 microseconds of one core's arithmetic; a meeting of two threads takes a few tenths of one.
_FLOPS_PER_MEETING = 100_000
# There is no mask on the columns of views here.
_CPU_VIEW_FIELDS = 3

_NEEDED = {"avx512": {"avx512f", "avx512bw"}, "avx2": {"avx2", "fma"}}


class CpuStep:
    """A plan packed for a number of samples, threads and an instruction set.

    Args:
        kernels: ``auto``, or ``avx512``, ``avx2``, ``baseline`` to force one.
        bf16: keep weights in bfloat16 (sums stay in float32): half the memory traffic, not exact.

    Raises:
        ArgumentError: settings that the extension does not have here, or weights that are not finite.
    """

    def __init__(self, plan: Plan, batch: int, *, threads: int, kernels: str = "auto", bf16: bool = False) -> None:
        extension = _engine.require()
        self.plan, self.batch = plan, batch
        self.tables = StepTables(plan)
        with refused_options():
            self.native = extension.make_step_plan(*self.tables.plan_arguments(batch), bf16, threads, kernels)
        self.tables.release()  # the extension has packed them


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


def useful_threads(plan: Plan, batch: int, available: int) -> int:
    """Threads that have enough to do between two meetings to be worth meeting. Results do not depend on it."""
    products = sum(term.weight.numel() for terms in plan.step_terms.values() for term in terms)
    return max(1, min(available, 2 * products * batch // (plan.num_levels * _FLOPS_PER_MEETING)))


def sample_cpu(
    compiled: CompiledPlan,
    step: CpuStep,
    state: GridState,
    request: SampleRequest,
    row_done: RowDone,
    logits: Tensor | None = None,
    on_phase: OnPhase | None = None,
) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]. ``logits`` [n, H, W, K] receives those of all positions."""
    plan = compiled.plan
    height, width = plan.shape
    settings, phases = request.settings, Phases(on_phase, compiled.device)
    state.codes.copy_(request.start_codes())
    noise, known = request.noise.contiguous(), request.known.contiguous()
    scratch = make_scratch(state, places=1)
    views = np.zeros((2, len(step.tables.ops), VIEW_FIELDS), dtype=np.int64)
    entries = len(step.tables.ops) * _CPU_VIEW_FIELDS
    for row in range(height):
        with phases.phase("row phase"):
            state.begin_row(row)
        kept = fill_views(views, step.tables, state, scratch, row)
        if logits is not None:
            views[0, plan.output] = logits_view(state, logits, row)
        values, starts = np.ascontiguousarray(views[:, :, :_CPU_VIEW_FIELDS])
        with phases.phase("step phase"):
            bad = step.native.run_row(
                row,
                array_address("values", values, np.int64, entries),
                array_address("starts", starts, np.int64, entries),
                *row_arguments(state, noise, known, settings, row),
            )
        kept.clear()  # the next row's values are worked out before these names are bound again
        if bad >= 0:
            sample, column = divmod(bad, width)
            raise not_drawable(sample, row, column)
        row_done(1)
    return state.codes


_Packed = tuple[CompiledPlan, CpuStep]


class CpuEngine(Engine[_Packed]):
    name = "cpu"
    precisions = ("float32", "bfloat16")
    plans = True

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it computes on the CPU, the prior is on {device}"
        return _engine.why_unavailable()

    def check(self, options: EngineOptions, device: torch.device | None = None) -> None:
        super().check(options, device)
        if device is not None:
            require_kernels(options.kernels)

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        threads = options.threads or useful_threads(kept.plan, batch, torch.get_num_threads())
        kernels, bf16 = options.kernels, options.precision == "bfloat16"
        step = kept.get(
            self.name,
            (batch, threads, kernels, bf16),
            lambda: CpuStep(kept.plan, batch, threads=threads, kernels=kernels, bf16=bf16),
        )
        return kept.compiled("library"), step

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        compiled, step = prepared
        state = GridState(compiled, len(request.noise), static_inputs(prior, request))
        return sample_cpu(compiled, step, state, request, row_done, on_phase=on_phase)
