"""A whole grid of the ``cuda`` engine as one CUDA graph: recorded once, replayed for every later micro-batch.

This spares the host the work of enqueueing a few kernels per row, which may limit small priors and batches.
A graph belongs to a packed plan, the way codes are drawn and the shapes of what the prior is told; it keeps a set of
caches of its own. On an NVIDIA H200, when rows still began with some hundred library kernels, whole grids of large
priors gained 1 to 2 % and a small one a third (43 instead of 66 ms); without a GPU only refusals can be tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq import _nvtx
from fastvq.errors import UnavailableError
from fastvq.kernels.launch import on_device
from fastvq.sampling.engines.base import RowDone
from fastvq.sampling.engines.cuda_grid import CudaStep, Grid, make_views, synchronise
from fastvq.sampling.engines.state import RowState
from fastvq.sampling.request import SampleRequest


class GraphedGrid:
    """A recorded grid.

    Args:
        state: the graph's own. What the prior is told and the request's numbers are copied into places of the graph's
            own, and those of later requests as well.

    Raises:
        UnavailableError: the plan is not on a GPU.
    """

    def __init__(self, step: CudaStep, state: RowState, request: SampleRequest) -> None:
        if step.device.type != "cuda":
            raise UnavailableError(f"cuda_graph: it needs a GPU, the plan is on {step.device}")
        self.step, self.state, self.settings = step, state, request.settings
        state.statics = {name: tensor.clone() for name, tensor in state.statics.items()}
        self._noise, self._known = request.noise.contiguous().clone(), request.known.contiguous().clone()
        self._start = request.start_codes().clone()
        # A recorded copy reads the host's memory in every replay.
        self._views = make_views(step)
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
        grid = Grid(self.step, self.state, self._noise, self._known, self.settings, self._views)
        grid.begin(self._start)
        for row in range(self.step.plan.shape[0]):
            grid.enqueue(row)
        return grid

    def fill(self, statics: dict[str, Tensor], request: SampleRequest, row_done: RowDone) -> Tensor:
        """Fill the grids of a request of the same key: int64 [n, H, W]. Rows are counted when all of them are done.

        Raises:
            ArgumentError: logits that are not finite.
        """
        with self.step.lock, on_device(self.step.device), _nvtx.annotate("grid"):
            try:
                for name, place in self.state.statics.items():
                    place.copy_(statics[name])
                self._noise.copy_(request.noise)
                self._known.copy_(request.known)
                self._start.copy_(request.start_codes())
                self._graph.replay()
                self._grid.check()
                codes = self.state.codes.clone()
            finally:
                synchronise(self.step.device)
        row_done(codes.shape[1], codes)
        return codes
