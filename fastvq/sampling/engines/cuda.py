"""The engine on an NVIDIA GPU: grids along a front where the plan allows it, otherwise row by row.

Along a front kernels are Triton's (:mod:`fastvq.sampling.engines.cuda_front`); rows are one launch of the compiled
extension each (:mod:`fastvq.sampling.engines.cuda_grid`). Both can be recorded as CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _engine
from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone, Schedule
from fastvq.sampling.engines.cuda_front import FrontPlan, takes_front, why_no_front_kernels
from fastvq.sampling.engines.cuda_graph import GraphedGrid
from fastvq.sampling.engines.cuda_grid import CudaStep, sample_cuda, why_no_cuda
from fastvq.sampling.engines.front_program import why_no_front
from fastvq.sampling.engines.front_tables import front_bytes
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.engines.prepared import Kept, plan_of, prepared
from fastvq.sampling.engines.state import CompiledPlan, GridState, cache_bytes, static_inputs, weight_bytes
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
# In rows: the plan, its packed steps, and where graphs of whole grids are kept if there are to be any.
_Packed = FrontPlan | tuple[CompiledPlan, CudaStep, Kept | None]


class CudaEngine(Engine[_Packed]):
    name = "cuda"
    precisions = ("float32", "bfloat16")
    plans = True
    cuda_graphs = True
    row_kernels = True
    tiles = True

    def why_not(self, prior: Prior, device: torch.device) -> str | None:
        if device.type == "cuda" and why_no_front(plan_of(prior)) is None:
            return why_no_front_kernels(device)
        return why_no_cuda(device)

    def padded(self, plan: Plan, options: EngineOptions) -> bool:
        return not takes_front(plan, options)

    def schedule(self, plan: Plan, batch: int, options: EngineOptions) -> Schedule:
        if takes_front(plan, options):
            element = 2 if options.precision == "bfloat16" else 4
            kept = weight_bytes(plan, element), batch * front_bytes(plan, element)
            return Schedule(plan.front(1), "the fewest steps", *kept)
        return Schedule(
            raster(plan.shape), "a row is one launch", weight_bytes(plan), batch * cache_bytes(plan, places=2)
        )

    def prepare(self, prior: Prior, batch: int, options: EngineOptions) -> _Packed:
        kept = prepared(prior)
        if takes_front(kept.plan, options):
            return FrontPlan.of(kept, options)
        precision = options.precision
        step = kept.get(
            self.name,
            (batch, precision),
            lambda: CudaStep(kept.plan, batch, kept.device, precision=precision),
            instead_of=(_GRAPH,),
        )
        return kept.compiled(options.row_kernel or "library"), step, kept if options.cuda_graph else None

    def fill(
        self, prepared: _Packed, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None
    ) -> Tensor:
        if isinstance(prepared, FrontPlan):
            return prepared.fill(prior, request, row_done, on_phase)
        compiled, step, graphs = prepared
        statics = static_inputs(prior, request)
        if graphs is None:
            state = GridState(compiled, len(request.noise), statics)
            return sample_cuda(compiled, step, state, request, row_done, on_phase=on_phase)
        graph = graphs.get(
            _GRAPH,
            (compiled, step, GraphedGrid.key(statics, request)),
            lambda: GraphedGrid(compiled, step, statics, request),
        )
        return graph.fill(statics, request, row_done)
