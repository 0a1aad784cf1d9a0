"""What the sampler's benchmark needs of engines beyond their calls; no other file here knows what they are made of."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastvq.models.prior import Prior
from fastvq.sampling import EngineOptions
from fastvq.sampling.engines import fill
from fastvq.sampling.engines.cuda import CudaEngine
from fastvq.sampling.engines.cuda_front import takes_front
from fastvq.sampling.engines.cuda_grid import CudaStep
from fastvq.sampling.engines.prepared import prepared
from fastvq.sampling.options import Precision
from fastvq.sampling.request import SampleRequest


def phase_seconds(engine: str, prior: Prior, request: SampleRequest, options: EngineOptions) -> dict[str, float]:
    """Seconds of the device in each phase of a grid, all rows together."""
    spent: dict[str, float] = {}

    def on_phase(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + seconds

    fill(engine, prior, request, lambda *_: None, options, on_phase=on_phase)
    return spent


@torch.inference_mode()
def traced_row(
    prior: Prior, request: SampleRequest, precision: Precision, module: ModuleType
) -> tuple[list[list[dict[str, Any]]], NDArray[np.int64]]:
    """The instructions of every block, and their times in the last row of a grid, as `bench.gpu.trace.Trace` has them.

    Args:
        module: the extension with a tracer.
    """
    engine, kept, batch = CudaEngine(), prepared(prior), len(request.noise)
    options = EngineOptions(precision=precision)
    if takes_front(kept.plan, options):
        options = EngineOptions(precision=precision, row_kernel="library")  # rows are what is traced
    rows, *_ = engine.prepare(prior, batch, options)
    step = CudaStep(kept.plan, batch, kept.device, precision=precision, extension=module)
    native, width = step.native, kept.plan.shape[1]
    times = torch.zeros((native.blocks, width, native.instructions, 5), dtype=torch.int64, device=kept.device)
    native.set_trace(times.data_ptr(), times.numel())
    engine.fill((rows, step, None), prior, request, lambda *_: None, None)
    native.set_trace(0, times.numel())
    return [native.program(block) for block in range(native.blocks)], times.cpu().numpy()
