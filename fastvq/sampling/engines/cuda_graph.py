"""A whole grid of the ``cuda`` engine as one CUDA graph: recorded once, replayed for every later micro-batch.

This spares the host the work of enqueueing some hundred small kernels per row, which limits small priors and batches.
A graph belongs to a packed plan, the way codes are drawn and the shapes of what the prior is told; it keeps a set of
caches of its own. On an NVIDIA H200 whole grids of large priors gained 1 to 2 %, of a small one a third (43 instead of
66 ms); without a GPU only its refusals can be tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _nvtx
from fastvq.errors import UnavailableError
from fastvq.kernels.launch import on_device
from fastvq.sampling.engines.base import RowDone
from fastvq.sampling.engines.cuda_grid import CudaStep, Grid, synchronise
from fastvq.sampling.engines.state import CompiledPlan, GridState
from fastvq.sampling.engines.step_tables import VIEW_FIELDS
from fastvq.sampling.request import SampleRequest


class GraphedGrid:
    """A recorded grid.

    Args:
        statics: what the prior is told, as `GridState` takes it; this and the request's numbers are copied into places
            of the graph's own, and those of later requests as well.

    Raises:
        UnavailableError: the plan is not on a GPU.
    """

    def __init__(
        self, compiled: CompiledPlan, step: CudaStep, statics: dict[str, Tensor], request: SampleRequest
    ) -> None:
        if step.device.type != "cuda":
            raise UnavailableError(f"cuda_graph: it needs a GPU, the plan is on {step.device}")
        self.compiled, self.step, self.settings = compiled, step, request.settings
        self._statics = {name: tensor.clone() for name, tensor in statics.items()}
        self._noise, self._known = request.noise.contiguous().clone(), request.known.contiguous().clone()
        self._start = request.start_codes().clone()
        height, _ = compiled.plan.shape
        shape = (height, 2, len(step.tables.ops), VIEW_FIELDS)
        self._host = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self._views = torch.empty(shape, dtype=torch.int64, device=step.device)
        with step.lock, on_device(step.device):
            self._record()

    @staticmethod
    def key(statics: dict[str, Tensor], request: SampleRequest) -> object:
        """Requests of equal keys can share a graph of one packed plan."""
        return request.settings, tuple((name, tuple(tensor.shape)) for name, tensor in statics.items())

    def _record(self) -> None:
        # Libraries choose and load their kernels when they are first called, which must not happen while recording.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._enqueue()
            synchronise(self.step.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._grid = self._enqueue()

    def _enqueue(self) -> Grid:
        # The state is made here because a replay has to begin with caches of zeros as well.
        state = GridState(self.compiled, self.step.batch, self._statics)
        state.codes.copy_(self._start)
        grid = Grid(self.step, state, self._noise, self._known, self.settings)
        # A recorded copy reads the host's memory in every replay, and there is a place for every row.
        for row, (host, device) in enumerate(zip(self._host, self._views, strict=True)):
            grid.enqueue(row, host, device)
        return grid

    def fill(self, statics: dict[str, Tensor], request: SampleRequest, row_done: RowDone) -> Tensor:
        """Fill the grids of a request of the same key: int64 [n, H, W]. Rows are counted when all of them are done.

        Raises:
            ArgumentError: logits that are not finite.
        """
        with self.step.lock, on_device(self.step.device), _nvtx.annotate("grid"):
            try:
                for name, place in self._statics.items():
                    place.copy_(statics[name])
                self._noise.copy_(request.noise)
                self._known.copy_(request.known)
                self._start.copy_(request.start_codes())
                self._graph.replay()
                self._grid.check()
                codes = self._grid.state.codes.clone()
            finally:
                synchronise(self.step.device)
        row_done(codes.shape[1])
        return codes
