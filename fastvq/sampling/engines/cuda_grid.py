"""The cached sampler with its step phase in CUDA: one launch fills a row, draws included, and nothing waits for it.

Rows are enqueued one after the other on the current stream: a few launches for what is known when a row starts
(`fastvq.sampling.engines.cuda_rows`; library kernels where those cannot run), then the one that fills it. The host is a
few rows ahead of the device; it reads nothing back before the end of the grid.
"""

from __future__ import annotations

import collections
import threading
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastvq import _engine, _nvtx
from fastvq._check import require_choice
from fastvq._memory import address
from fastvq.errors import UnavailableError
from fastvq.kernels.launch import on_device
from fastvq.sampling.engines.base import RowDone
from fastvq.sampling.engines.phases import OnPhase, Phases
from fastvq.sampling.engines.state import RowState, SteadyState
from fastvq.sampling.engines.step_tables import (
    VIEW_FIELDS,
    PlanTables,
    fill_all_views,
    fill_views,
    logits_view,
    make_scratch,
    not_drawable,
    plan_sizes,
    refused_options,
    row_arguments,
)
from fastvq.sampling.plan.form import Plan
from fastvq.sampling.request import SampleRequest, Settings

# Rows that the host may be ahead: enough to hide its own work, and few enough that Ctrl-C and progress are prompt.
ROWS_IN_FLIGHT = 3
# Matrix instructions of bfloat16, and copies past the first cache.
LEAST_CAPABILITY = (8, 0)
# What the status word holds while every position could be drawn.
NOTHING_BAD = 2**63 - 1


def why_no_cuda(device: torch.device) -> str | None:
    """Why the engine cannot run on a device, or None when it can."""
    if device.type != "cuda":
        return f"it computes on a GPU, the prior is on {device}"
    reason = _engine.why_unavailable()
    if reason is not None:
        return reason
    extension = _engine.require()
    if not getattr(extension, "CUDA", False):
        return "the compiled extension was built without CUDA (nvcc was not found)"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    info = extension.cuda_info()
    if info["error"]:
        return f"CUDA does not work in the extension ({info['error']})"
    index = _index(device)
    if index >= min(info["device_count"], torch.cuda.device_count()):
        return f"there is no GPU {index}"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or higher, {device} has {capability[0]}.{capability[1]}"
    return None


class CudaStep:
    """A plan packed for a number of samples on one GPU.

    Args:
        device: where the priors' caches lie. The CPU is for extensions that run kernels there.
        precision: of the weights and of what they multiply; sums are float32 either way.
        blocks: of a launch, all of which have to be resident; 0 for as many as the device holds.
        shared_limit: bytes of shared memory of a block; 0 for what the device offers.
        extension: what to call instead of the compiled extension.

    Raises:
        ArgumentError: settings that do not fit the plan or the device, or weights that are not finite.
        UnavailableError: the extension was built without CUDA.

    Rows of one step must not overlap, so grids take turns: `lock` is held while one is filled.
    """

    def __init__(
        self,
        plan: Plan,
        batch: int,
        device: torch.device,
        *,
        precision: str,
        blocks: int = 0,
        shared_limit: int = 0,
        extension: ModuleType | None = None,
    ) -> None:
        require_choice("precision", precision, ("float32", "bfloat16"))
        if extension is None:
            reason = why_no_cuda(device)
            if reason is not None:
                raise UnavailableError(f"engine: 'cuda' was asked for but cannot run here: {reason}")
            extension = _engine.require()
        self.plan, self.batch, self.device, self.precision = plan, batch, device, precision
        self.lock = threading.Lock()
        self.tables = PlanTables(plan, above=False)
        with on_device(device), refused_options():
            self.native = extension.make_cuda_plan(
                *self.tables.addresses,
                *plan_sizes(plan, batch),
                precision == "bfloat16",
                _index(device),
                blocks,
                shared_limit,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights were copied on another stream
        self.tables.release()  # the extension has packed them


Views = tuple[Tensor, Tensor]


def make_views(step: CudaStep) -> Views:
    """Room for the views of all rows on the host and on the device: int64 [H, 2, operations, 4]."""
    shape = (step.plan.shape[0], 2, len(step.tables.ops), VIEW_FIELDS)
    host = torch.empty(shape, dtype=torch.int64, pin_memory=step.device.type == "cuda")
    return host, torch.empty(shape, dtype=torch.int64, device=step.device)


class Grid:
    """What the rows of one grid are enqueued from: the state, room for the current position, the status word.

    Args:
        noise, known: float32 and bool [n, H, W], contiguous.
        views: see `make_views`. Copies of them wait on the host, which must not write there again before all rows are
            done.
        logits: None, or float32 [n, H, W, K] to receive those of all positions.
        on_phase: what is told how long the phases took.
    """

    def __init__(
        self,
        step: CudaStep,
        state: RowState,
        noise: Tensor,
        known: Tensor,
        settings: Settings,
        views: Views,
        logits: Tensor | None = None,
        on_phase: OnPhase | None = None,
    ) -> None:
        self.step, self.state, self.settings, self.logits = step, state, settings, logits
        self.phases = Phases(on_phase, step.device)
        self.noise, self.known = noise, known
        self.host, self.device = views
        self.scratch = make_scratch(state, places=2)
        self.status = torch.full((1,), NOTHING_BAD, dtype=torch.int64, device=step.device)

    def begin(self, codes: Tensor) -> None:
        """Enqueue what comes before the first row; ``codes`` [n, H, W] are those that the grid starts from."""
        self.state.begin(codes)
        if isinstance(self.state, SteadyState):
            views = self.host.numpy()
            fill_all_views(views, self.step.tables, self.state, self.scratch)
            for row in range(len(views)):
                self._view_logits(views[row], row)
            self.device.copy_(self.host, non_blocking=True)

    def enqueue(self, row: int) -> list[Tensor]:
        """Enqueue a row.

        Returns tensors to keep until the launch is enqueued. They need not be kept longer: the allocator gives memory
        of a stream to later work of the same stream only, which runs after the launch.
        """
        step, state = self.step, self.state
        entries = 2 * len(step.tables.ops) * VIEW_FIELDS
        kept: list[Tensor] = []
        with self.phases.phase("row phase"):
            state.begin_row(row)
            if not isinstance(state, SteadyState):
                views = self.host[row].numpy()
                kept = fill_views(views, step.tables, state, self.scratch, row)
                self._view_logits(views, row)
                self.device[row].copy_(self.host[row], non_blocking=True)
        with self.phases.phase("step phase"):
            step.native.run_row(
                row,
                address("host", self.host[row], torch.int64, entries),
                address("device", self.device[row], torch.int64, entries, step.device),
                *row_arguments(state, self.noise, self.known, self.settings, row),
                address("status", self.status, torch.int64, 1, step.device),
                _stream(step.device),
            )
        return kept

    def _view_logits(self, views: np.ndarray, row: int) -> None:
        if self.logits is not None:
            views[0, self.step.plan.output] = logits_view(self.state, self.logits, row)

    def check(self) -> None:
        """Wait for all rows, and refuse grids of which a position could not be drawn.

        Raises:
            ArgumentError: its logits are not finite.
        """
        bad = int(self.status)
        if bad != NOTHING_BAD:
            position, sample = divmod(bad, self.state.batch)
            raise not_drawable(sample, *divmod(position, self.state.width))


def sample_cuda(
    step: CudaStep,
    state: RowState,
    request: SampleRequest,
    row_done: RowDone,
    logits: Tensor | None = None,
    on_phase: OnPhase | None = None,
) -> Tensor:
    """Fill the grids of a request: int64 [n, H, W]. ``logits`` [n, H, W, K] receives those of all positions.

    Raises:
        ArgumentError: logits that are not finite; the whole grid has been computed then.
    """
    height, _ = step.plan.shape
    with step.lock, on_device(step.device), _nvtx.annotate("grid"):
        noise, known = request.noise.contiguous(), request.known.contiguous()
        grid = Grid(step, state, noise, known, request.settings, make_views(step), logits, on_phase)
        rows: collections.deque[torch.cuda.Event | None] = collections.deque()

        def finish() -> None:
            event = rows.popleft()
            if event is not None:
                event.synchronize()
            row_done(1, state.codes)

        try:
            grid.begin(request.start_codes())
            for row in range(height):
                if len(rows) == ROWS_IN_FLIGHT:
                    finish()
                with _nvtx.annotate("row"):
                    grid.enqueue(row)
                rows.append(torch.cuda.Event(blocking=True) if step.device.type == "cuda" else None)
                if rows[-1] is not None:
                    rows[-1].record()
            while rows:
                finish()
            grid.check()
            grid.phases.finish()
        finally:
            # The next grid may come on another stream, and must find nothing of this one running.
            synchronise(step.device)
    return state.codes


def synchronise(device: torch.device) -> None:
    """Wait for the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
