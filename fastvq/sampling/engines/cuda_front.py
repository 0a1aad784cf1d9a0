"""The ``cuda`` engine along a front: the whole grid is enqueued step by step, a few wide kernels each.

For priors without attention, see `fastvq.sampling.plan.Front`. A step takes one position of every row in flight, of all
samples at once; each kernel finds its positions from the number of the step, which lies in device memory, so that the
launches of all steps are the same: a CUDA graph of one step is recorded and serves for all, as the host could not
enqueue kernels one by one as fast as small batches are done. Kernels are Triton's; the compiled extension is not
needed.

Every output is summed in one order that does not depend on the batch, see `fastvq.kernels.front_product`, and what is
known of a condition is worked out for a fixed number of samples at a time: the codes of a sample are the same whatever
it is sampled with.
"""

from __future__ import annotations

import collections
import threading

import torch
from torch import Tensor

from fastvq import _nvtx
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.kernels.front_tiles import draw_block, ranked_block
from fastvq.kernels.launch import on_device
from fastvq.models.prior import Prior
from fastvq.ops.dispatch import triton_reason
from fastvq.sampling.engines.base import RowDone
from fastvq.sampling.engines.cuda_grid import LEAST_CAPABILITY, NOTHING_BAD, ROWS_IN_FLIGHT, synchronise
from fastvq.sampling.engines.front_launch import StepKernels
from fastvq.sampling.engines.front_tables import static_sizes
from fastvq.sampling.engines.front_weights import FrontWeights
from fastvq.sampling.engines.front_work import Work, why_no_front
from fastvq.sampling.engines.phases import OnPhase, Phases
from fastvq.sampling.engines.prepared import Kept, Prepared
from fastvq.sampling.engines.state import steady_statics
from fastvq.sampling.engines.step_tables import not_drawable
from fastvq.sampling.options import EngineOptions
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.request import SampleRequest, Settings

_GRAPH = "front graph"


def why_no_front_kernels(device: torch.device) -> str | None:
    """Why kernels for whole steps cannot run on a device, or None when they can."""
    reason = triton_reason(torch.empty(0, device=device))
    if reason is None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            return f"it needs compute capability {least} or higher, {device} has {major}.{minor}"
    return reason


def takes_front(plan: Plan, options: EngineOptions) -> bool:
    """Whether a plan is sampled along a front: where it can be, unless options ask for raster order.

    That is what a tile as wide as the grid means, and a row kernel.

    Raises:
        ArgumentError: tiles of several columns, or options that contradict each other.
    """
    width, tile = plan.shape[1], options.tile
    if tile is not None:
        plan.front(tile)
        if tile not in (1, width):
            raise ArgumentError(f"tile: the cuda engine samples tiles of 1 column or of all {width}, got {tile}")
    if tile == width or (tile is None and options.row_kernel is not None):
        return False
    reason = why_no_front(plan)
    if tile is not None and reason is not None:
        raise ArgumentError(f"tile: expected {width}, the width of the grid, got {tile}: {reason}")
    if tile is not None and options.row_kernel is not None:
        raise ArgumentError(f"row_kernel: there is no row phase along a front, got {options.row_kernel!r}")
    return reason is None


def is_filtered(settings: Settings, num_codes: int) -> bool:
    """Whether codes are drawn by rank."""
    _, top_k, top_p = settings.numbers(num_codes)
    return top_k < num_codes or top_p < 1


class FrontPlan:
    """A prior's plan packed for a precision; ``graphs``, if given, keeps grids and their graphs for later calls."""

    def __init__(self, weights: FrontWeights, graphs: Kept | None) -> None:
        self.weights, self._graphs = weights, graphs

    @classmethod
    def of(cls, kept: Prepared, options: EngineOptions) -> FrontPlan:
        """
        Raises:
            ArgumentError: weights that are not finite.
            UnavailableError: Triton's kernels cannot run where the prior is, or there is no GPU to record a graph on.
        """
        reason = why_no_front_kernels(kept.device)
        if reason is not None:
            raise UnavailableError(f"engine: 'cuda' was asked for but cannot run here: {reason}")
        if options.cuda_graph and kept.device.type != "cuda":
            raise UnavailableError(f"cuda_graph: it needs a GPU, the plan is on {kept.device}")
        precision = options.precision
        weights = kept.get(
            "front",
            precision,
            lambda: FrontWeights(Work.front(kept.plan), kept.device, precision),
            instead_of=(_GRAPH,),
        )
        return cls(weights, kept if options.cuda_graph else None)

    def fill(self, prior: Prior, request: SampleRequest, row_done: RowDone, on_phase: OnPhase | None) -> Tensor:
        """See `fastvq.sampling.engines.base.Engine.fill`."""
        weights, statics = self.weights, steady_statics(prior, request)
        batch, filtered = len(request.noise), is_filtered(request.settings, weights.plan.num_codes)

        def make() -> FrontGrid:
            return FrontGrid(weights, batch, statics, filtered=filtered)

        if self._graphs is None:
            return make().fill(request, statics, row_done, on_phase)
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in statics.items())
        grid = self._graphs.get(_GRAPH, (weights, batch, filtered, shapes), make)
        return grid.fill(request, statics, row_done, on_phase)


class FrontGrid(StepKernels):
    """The caches of one micro-batch, and the launches of a step.

    Args:
        statics: what the prior is told: of the shapes that `begin` is given.
        filtered: codes are drawn by top_k or top_p.
        keep_logits: ``logits`` is float32 [n, H, W, K] and receives those of all positions.
    """

    def __init__(
        self,
        weights: FrontWeights,
        batch: int,
        statics: dict[str, Tensor],
        *,
        filtered: bool = False,
        keep_logits: bool = False,
    ) -> None:
        super().__init__(weights, batch, static_sizes(statics))
        self.front, self.filtered = self.plan.front(1), filtered
        self.lock = threading.Lock()
        device = self.device
        height, width = self.plan.shape
        sizes = (batch, height, width)
        self.codes = torch.empty(sizes, dtype=torch.int64, device=device)
        self.noise = torch.empty(sizes, dtype=torch.float32, device=device)
        self.known = torch.empty(sizes, dtype=torch.bool, device=device)
        shape = (*sizes, self.plan.num_codes)
        self.logits = torch.empty(shape, dtype=torch.float32, device=device) if keep_logits else None
        self._options = torch.empty(3, dtype=torch.float32, device=device)
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.status = torch.full((1,), NOTHING_BAD, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, request: SampleRequest, statics: dict[str, Tensor]) -> None:
        """Enqueue what comes before the first step."""
        self.codes.copy_(request.start_codes())
        self.noise.copy_(request.noise)
        self.known.copy_(request.known)
        self._options.copy_(torch.tensor(request.settings.numbers(self.plan.num_codes)))
        self.step.zero_()
        self.status.fill_(NOTHING_BAD)
        self.put_statics(statics)

    def _record(self) -> None:
        """Record a step. One must have been enqueued: kernels are compiled and loaded when they are first launched."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            # What other threads do on the device is none of this one's business.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.enqueue_step()
            finally:
                graph.capture_end()
        self._graph = graph

    def enqueue_step(self) -> None:
        """Enqueue the next step, all of it or the graph that has been recorded."""
        if self._graph is not None:
            self._graph.replay()
            return
        self.enqueue(self.step, self.codes)
        self._draw()
        self.step.add_(1)

    def _draw(self) -> None:
        from fastvq.kernels.front_draw import _draw_kernel

        height, width = self.plan.shape
        num_codes, warps = self.plan.num_codes, self.weights.draw.warps
        block = draw_block(num_codes)
        _draw_kernel[(self.layout.capacity,)](
            self.step, self.values, self.codes, self.noise, self.known, self._options, self.logits, self.status,
            self.batch, self.layout.value_places[self.plan.output], num_codes,
            HEIGHT=height, WIDTH=width, SKEW=self.front.skew, FILTERED=self.filtered,
            BLOCK=block, BLOCK_RANKED=ranked_block(block, warps), num_warps=warps,
        )  # fmt: skip

    def fill(
        self,
        request: SampleRequest,
        statics: dict[str, Tensor],
        row_done: RowDone = lambda rows, codes: None,
        on_phase: OnPhase | None = None,
        *,
        recorded: bool = True,
    ) -> Tensor:
        """Fill the grids of a request: int64 [n, H, W].

        Args:
            statics: of the shapes given before.
            on_phase: is told the time of all steps together, as ``step phase``.
            recorded: on a GPU, steps are replayed from a CUDA graph, which is recorded after the first step of the
                first grid; not while the caller records one.

        Raises:
            ArgumentError: logits that are not finite; the whole grid has been computed then.
        """
        recorded = recorded and self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        phases = Phases(on_phase, self.device)
        done = 0
        rows: collections.deque[torch.cuda.Event] = collections.deque()
        with self.lock, on_device(self.device), _nvtx.annotate("grid"):
            try:
                self.begin(request, statics)
                with phases.phase("step phase"):
                    for step in range(self.front.steps):
                        if step == 1 and recorded and self._graph is None:
                            self._record()
                        self.enqueue_step()
                        for _ in range(done + len(rows), self.front.last_rows(step)):
                            if self.device.type == "cuda":
                                rows.append(torch.cuda.Event(blocking=True))
                                rows[-1].record()
                            else:
                                done += 1
                                row_done(1, self.codes)
                        # The host is to stay near the device, so that Ctrl-C and progress are prompt.
                        while len(rows) > ROWS_IN_FLIGHT:
                            rows.popleft().synchronize()
                            done += 1
                            row_done(1, self.codes)
                for event in rows:
                    event.synchronize()
                    row_done(1, self.codes)
                self._check()
                phases.finish()
                return self.codes.clone()
            finally:
                # The next grid may come on another stream, and must find nothing of this one running.
                synchronise(self.device)

    def _check(self) -> None:
        bad = int(self.status)
        if bad != NOTHING_BAD:
            position, sample = divmod(bad, self.batch)
            raise not_drawable(sample, *divmod(position, self.plan.shape[1]))
