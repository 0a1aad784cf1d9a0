"""The engines that can fill grids, the choice between them, and what they keep from one call to the next."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastvq import _engine
from fastvq._check import require_choice
from fastvq._evaluation import in_evaluation
from fastvq._precision import full_float32
from fastvq._watch import Snapshot, contents_of
from fastvq.errors import ArgumentError, NaiveEngineWarning, UnavailableError
from fastvq.models.prior import Prior
from fastvq.sampling.cpu_engine import CpuStep, sample_cpu, useful_threads
from fastvq.sampling.cuda_engine import CudaStep, sample_cuda, why_no_cuda
from fastvq.sampling.cuda_graph import GraphedGrid
from fastvq.sampling.lower import compile_plan
from fastvq.sampling.naive import sample_naive
from fastvq.sampling.options import ENGINES, PRECISIONS, EngineOptions, Precision, check_precision
from fastvq.sampling.plan import Plan
from fastvq.sampling.recognise import PLANNED, why_no_plan
from fastvq.sampling.request import SampleRequest
from fastvq.sampling.state import CompiledPlan, GridState, RowKernel
from fastvq.sampling.torch_engine import TorchStep, sample_torch

__all__ = [
    "ENGINES",
    "EngineOptions",
    "Precision",
    "choose_engine",
    "evaluated_for",
    "fill",
    "plan_of",
    "static_inputs",
    "warn_slow",
    "why_not",
    "why_slow",
]

RowDone = Callable[[], None]


def why_not(engine: str, prior: Prior) -> str | None:
    """Why an engine cannot run a prior where it is, or None."""
    return _why_not(engine, _device(prior), None if engine == "naive" else why_no_plan(prior))


def _why_not(engine: str, device: torch.device, no_plan: str | None) -> str | None:
    if device.type == "meta":
        return "the weights of the prior are on the meta device, which holds no values"
    if engine == "naive":
        return None
    if no_plan is not None or engine == "torch":
        return no_plan
    if engine == "cuda":
        return why_no_cuda(device)
    if device.type != "cpu":
        return f"it computes on the CPU, the prior is on {device}"
    return _engine.why_unavailable()


def _device(prior: Prior) -> torch.device:
    first = next(prior.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def choose_engine(
    engine: str, prior: Prior, precision: str = "float32", options: EngineOptions | None = None
) -> tuple[str, str]:
    """Name of the engine that would fill this prior's grids, and why that one.

    Raises:
        ArgumentError: there is no engine of that name, or it does not have the precision or the options.
        UnavailableError: the engine asked for, or what the options ask of it, cannot run this prior here.
    """
    require_choice("precision", precision, PRECISIONS)
    device = _device(prior)
    if engine == "auto":
        no_plan = why_no_plan(prior)
        passed: list[str] = []
        for name in ENGINES:
            reason = _why_not(name, device, no_plan)
            if reason is None:
                engine, why = name, "; ".join([*passed, f"{name} is the fastest that runs here"])
                break
            passed.append(f"{name}: {reason}")
        else:
            raise UnavailableError(f"engine: none can run here: {reason}")
    elif engine not in ENGINES:
        raise ArgumentError(f"engine: expected 'auto' or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    else:
        reason = why_not(engine, prior)
        if reason is not None:
            raise UnavailableError(f"engine: {engine!r} was asked for but cannot run here: {reason}")
        why = "asked for by name"
    check_precision(engine, precision)
    if options is not None:
        options.check(engine, device)
    return engine, why


def why_slow(asked: str, chosen: str, prior: Prior) -> str | None:
    """Why the naive engine was taken for a prior of a class that the cached ones run, or None if it was not."""
    if asked != "auto" or chosen != "naive" or not isinstance(prior, PLANNED):
        return None
    return why_no_plan(prior)


def warn_slow(reasons: Sequence[str], stacklevel: int) -> None:
    """One warning for a call that takes the naive engine for these reasons; ``stacklevel`` 1 is the caller's line."""
    if reasons:
        text = "; ".join(dict.fromkeys(reasons))
        warnings.warn(
            f"sampling without a cache, many times slower: {text}. engine='naive' asks for this and is silent",
            NaiveEngineWarning,
            stacklevel=stacklevel + 1,
        )


def evaluated_for(engine: str, prior: Prior) -> Prior:
    """The prior in evaluation mode, as far as an engine runs its modules: cached ones have all else in the plan."""
    return in_evaluation(prior, only=None if engine == "naive" else "context_encoder")


def fill(
    engine: str,
    prior: Prior,
    request: SampleRequest,
    row_done: RowDone,
    options: EngineOptions | None = None,
    *,
    evaluated: Prior | None = None,
) -> Tensor:
    """Fill the grids of one micro-batch with a chosen engine: int64 [n, H, W].

    ``evaluated`` is what :func:`evaluated_for` gives, for callers that fill several.

    Raises:
        ArgumentError: options that this engine does not have, weights or logits that are not finite.
    """
    options = options or EngineOptions()
    options.check(engine)
    evaluated = evaluated_for(engine, prior) if evaluated is None else evaluated
    device = request.noise.device
    with torch.inference_mode(), full_float32(device), _repeatable(device):
        if engine == "naive":
            return sample_naive(evaluated, request, row_done)
        prepared = _prepared(prior)
        compiled = prepared.compiled_with(options.row_kernel)
        batch = request.noise.shape[0]
        statics = static_inputs(evaluated, request)
        if engine == "torch":
            step = prepared.torch_step()
            return sample_torch(compiled, step, GridState(compiled, batch, statics), request, row_done)
        if engine == "cpu":
            packed = prepared.cpu_step(batch, options)
            return sample_cpu(compiled, packed, GridState(compiled, batch, statics), request, row_done)
        on_gpu = prepared.cuda_step(batch, options)
        if options.cuda_graph:
            return prepared.graph(compiled, on_gpu, statics, request).fill(statics, request, row_done)
        return sample_cuda(compiled, on_gpu, GridState(compiled, batch, statics), request, row_done)


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same convolution for the same shapes: cuDNN is not to try several and take the one that was quickest."""
    if device.type != "cuda":
        yield
        return
    library = torch.backends.cudnn
    before = library.benchmark, library.deterministic
    library.benchmark, library.deterministic = False, True
    try:
        yield
    finally:
        library.benchmark, library.deterministic = before


def plan_of(prior: Prior) -> Plan:
    """The plan of a prior as its weights are now.

    Raises:
        UnavailableError: there is no plan of this prior.
    """
    return _prepared(prior).compiled.plan


def static_inputs(prior: Prior, request: SampleRequest) -> dict[str, Tensor]:
    """What is known before the first position: [B or 1, C, H or 1, W or 1] by name."""
    batch = request.noise.shape[0]
    context = prior.context(request.condition, request.label, batch=batch)
    inputs = {}
    background = getattr(prior, "background", None)
    if isinstance(background, Tensor):
        inputs["background"] = background.float()
    if context is not None:
        inputs["context" if prior.config.condition_shapes else "label"] = context.float()
    return inputs


class _Prepared:
    """A compiled plan and the weights packed for it. Everything in it is read-only once made."""

    def __init__(self, prior: Prior, weights: Snapshot) -> None:
        self.weights = weights
        self.compiled = CompiledPlan(compile_plan(prior), next(prior.parameters()).device)
        self._lock = threading.Lock()
        self._triton: CompiledPlan | None = None
        self._torch: TorchStep | None = None
        self._cpu: tuple[object, CpuStep] | None = None
        self._cuda: tuple[object, CudaStep] | None = None
        self._graph: tuple[object, GraphedGrid] | None = None

    def compiled_with(self, row_kernel: RowKernel) -> CompiledPlan:
        if row_kernel == "library":
            return self.compiled
        with self._lock:
            if self._triton is None:
                self._triton = CompiledPlan(self.compiled.plan, self.compiled.device, row_kernel)
            return self._triton

    def torch_step(self) -> TorchStep:
        with self._lock:
            if self._torch is None:
                self._torch = TorchStep(self.compiled)
            return self._torch

    def cpu_step(self, batch: int, options: EngineOptions) -> CpuStep:
        threads = options.threads or useful_threads(self.compiled.plan, batch, torch.get_num_threads())
        key = (batch, threads, options.precision, options.kernels)
        with self._lock:
            if self._cpu is None or self._cpu[0] != key:
                bf16 = options.precision == "bfloat16"
                step = CpuStep(self.compiled.plan, batch, threads=threads, kernels=options.kernels, bf16=bf16)
                self._cpu = (key, step)
            return self._cpu[1]

    def cuda_step(self, batch: int, options: EngineOptions) -> CudaStep:
        key = (batch, options.precision)
        with self._lock:
            if self._cuda is None or self._cuda[0] != key:
                self._cuda = self._graph = None  # their memory makes room
                step = CudaStep(self.compiled.plan, batch, self.compiled.device, precision=options.precision)
                self._cuda = (key, step)
            return self._cuda[1]

    def graph(
        self, compiled: CompiledPlan, step: CudaStep, statics: dict[str, Tensor], request: SampleRequest
    ) -> GraphedGrid:
        key = (id(compiled), id(step), GraphedGrid.key(statics, request))
        with self._lock:
            if self._graph is None or self._graph[0] != key:
                self._graph = None
                self._graph = (key, GraphedGrid(compiled, step, statics, request))
            return self._graph[1]


_LOCK = threading.Lock()
_PREPARED: weakref.WeakKeyDictionary[Prior, _Prepared] = weakref.WeakKeyDictionary()


def _prepared(prior: Prior) -> _Prepared:
    """The compiled form of a prior, made again when any of its weights has changed, in whatever way."""
    _, tensors = contents_of(prior)
    found = _PREPARED.get(prior)
    # Reading all weights takes a while, in which other threads need not wait.
    if found is not None and found.weights.matches(tensors):
        return found
    with _LOCK:
        made = _PREPARED.get(prior)
        # Another thread may have been here first.
        if made is None or made is found or not made.weights.matches(tensors):
            # The snapshot is older than the plan: what is changed between the two is noticed the next time.
            with torch.no_grad():
                made = _PREPARED[prior] = _Prepared(prior, Snapshot(tensors))
        return made
