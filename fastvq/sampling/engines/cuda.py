"""The engine on an NVIDIA GPU: grids along a front where the plan allows it, otherwise row by row.

Along a front kernels are Triton's (:mod:`fastvq.sampling.engines.cuda_front`). A row is one launch of the compiled
extension (:mod:`fastvq.sampling.engines.cuda_grid`), before which the same Triton kernels work out what is known
(:mod:`fastvq.sampling.engines.cuda_rows`). Both can be recorded as CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq.kernels.front_tiles import PLANES
from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone, Schedule
from fastvq.sampling.engines.cuda_front import FrontPlan, takes_front, why_no_front_kernels
from fastvq.sampling.engines.cuda_graph import GraphedGrid
from fastvq.sampling.engines.cuda_grid import CudaStep, sample_cuda, why_no_cuda
from fastvq.sampling.engines.cuda_rows import ProductState, RowProducts, product_bytes, row_launches
from fastvq.sampling.engines.front_tables import front_bytes
from fastvq.sampling.engines.front_work import why_no_front, why_no_rows
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.engines.prepared import Kept, plan_of, prepared
from fastvq.sampling.engines.state import (
    CompiledPlan,
    GridState,
    RowState,
    cache_bytes,
    steady_statics,
    weight_bytes,
)
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.plan.front import raster
from fastvq.sampling.request import SampleRequest


def cuda_summary() -> str:
    """What the extension was built for, in one line."""
    reason = _engine.why_unavailable()
    if reason is not None or not getattr(_engine.require(), "CUDA", False):
        return "not in the extension"
    info = _engine.require().cuda_info()
    devices = info["error"] or f"{info['device_count']} device(s)"
    return f"{info['compiled']} for {info['architectures']}; {devices}"


_GRAPH = "cuda graph"
# In rows: what their row phase is packed as, their packed steps, and where graphs of whole grids are kept if there are
# to be any.
_Packed = FrontPlan | tuple[RowProducts | CompiledPlan, CudaStep, Kept | None]


def why_library_rows(plan: Plan, options: EngineOptions) -> str | None:
    """Why the row phase of a plan is left to PyTorch's convolutions, or None where the products of the front do it."""
    if options.row_kernel == "library":
        return "asked for"
    bias = plan.ops[plan.output].bias
    assert bias is not None
    return why_no_rows(plan) or why_no_front_kernels(bias.device)


class CudaEngine(Engine[_Packed]):
    name = "cuda"
    precisions = ("float32", "bfloat16")
    plans = True
    exact = True
    cuda_graphs = True
    row_kernels = True
    tiles = True

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        if device.type == "cuda" and why_no_front(plan_of(prior)) is None:
            return why_no_front_kernels(device)
        return why_no_cuda(device)

    def padded(self, plan: Plan, options: EngineOptions) -> bool:
        return not takes_front(plan, options) and why_library_rows(plan, options) is not None

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        element = 2 * PLANES[options.precision]
        if takes_front(plan, options):
            kept = weight_bytes(plan, element), batch * front_bytes(plan, element)
            return Schedule(plan.front(1), "the fewest steps", *kept)
        reason = why_library_rows(plan, options)
        if reason is None:
            reason = f"a row is {row_launches(plan)} launches for what it knows beforehand and one that fills it"
            kept = weight_bytes(plan, element), product_bytes(plan, batch, options.precision)
        else:
            reason = f"a row is library convolutions for what it knows beforehand ({reason}) and a launch that fills it"
            kept = weight_bytes(plan), batch * cache_bytes(plan, places=2)
        return Schedule(raster(plan.shape), reason, *kept)

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        plan, device, precision = kept.plan, kept.device, options.precision
        if takes_front(plan, options):
            return FrontPlan.of(kept, options)
        # Micro-batches of a call differ by a sample, which is no reason to pack weights again.
        more = () if self.padded(plan, options) else ((batch + 1, precision),)
        step = kept.get(
            self.name,
            (batch, precision),
            lambda: CudaStep(plan, batch, device, precision=precision),
            instead_of=(_GRAPH,),
            also=more,
        )
        rows: RowProducts | CompiledPlan
        if why_library_rows(plan, options) is None:
            rows = kept.get("row products", precision, lambda: RowProducts(plan, device, precision))
        else:
            rows = kept.compiled()
        return rows, step, kept if options.cuda_graph else None

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        if isinstance(prepared, FrontPlan):
            return prepared.fill(prior, request, row_done, on_phase)
        rows, step, graphs = prepared
        n = len(request.noise)
        if step.batch > n:
            request = request.rows(torch.arange(step.batch).clamp(max=n - 1).to(request.noise.device))
        statics = steady_statics(prior, request)

        def make() -> RowState:
            if isinstance(rows, RowProducts):
                return ProductState(rows, step.batch, statics)
            return GridState(rows, step.batch, statics)

        def done(count: int, codes: Tensor) -> None:
            row_done(count, codes[:n])

        if graphs is None:
            return sample_cuda(step, make(), request, done, on_phase=on_phase)[:n]
        graph = graphs.get(
            _GRAPH,
            (rows, step, GraphedGrid.key(statics, request)),
            lambda: GraphedGrid(step, make(), request),
        )
        return graph.fill(statics, request, done)[:n]
