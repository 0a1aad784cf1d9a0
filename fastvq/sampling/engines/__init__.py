"""The engines that can fill grids, the choice between them, and one call for all of them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvq._precision import full_float32
from fastvq.errors import ArgumentError, NaiveEngineWarning, UnavailableError
from fastvq.models.prior import Prior
from fastvq.sampling.engines.base import Engine, RowDone
from fastvq.sampling.engines.cpu import CpuEngine
from fastvq.sampling.engines.cuda import CudaEngine
from fastvq.sampling.engines.naive import NaiveEngine
from fastvq.sampling.engines.phases import OnPhase
from fastvq.sampling.engines.prepared import plan_of
from fastvq.sampling.engines.pytorch import TorchEngine
from fastvq.sampling.engines.state import static_inputs
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.plan import has_writer, why_no_plan
from fastvq.sampling.request import SampleRequest

__all__ = [
    "ENGINES",
    "Engine",
    "OnPhase",
    "RowDone",
    "choose",
    "choose_engine",
    "engine_named",
    "engine_names",
    "fill",
    "plan_of",
    "static_inputs",
    "warn_slow",
    "why_no_values",
    "why_not",
    "why_slow",
]

# Fastest first; "auto" takes the first that can run.
ENGINES: tuple[Engine[Any], ...] = (CudaEngine(), CpuEngine(), TorchEngine(), NaiveEngine())


def engine_names() -> tuple[str, ...]:
    return tuple(engine.name for engine in ENGINES)


def engine_named(name: str) -> Engine[Any]:
    """
    Raises:
        ArgumentError: there is no engine of that name.
    """
    for engine in ENGINES:
        if engine.name == name:
            return engine
    raise ArgumentError(f"engine: expected 'auto' or one of {', '.join(map(repr, engine_names()))}, got {name!r}")


def why_not(name: str, prior: Prior) -> str | None:
    """Why an engine cannot run a prior where it is, or None."""
    return _Candidate(prior).why_not(engine_named(name))


def why_no_values(prior: Prior) -> str | None:
    """Why there is nothing to sample from, whatever the engine, or None."""
    if _device(prior).type != "meta":
        return None
    return "the weights of the prior are on the meta device, which holds no values"


def _device(prior: Prior) -> torch.device:
    first = next(prior.parameters(), None)
    return torch.device("cpu") if first is None else first.device


class _Candidate:
    """A prior that engines are tried on; whether there is a plan of it takes a while to say, and is asked once."""

    def __init__(self, prior: Prior) -> None:
        self.prior, self.device = prior, _device(prior)

    @functools.cached_property
    def no_plan(self) -> str | None:
        return why_no_plan(self.prior)

    def why_not(self, engine: Engine[Any]) -> str | None:
        reason = why_no_values(self.prior)
        if reason is None and engine.plans:
            reason = self.no_plan
        return engine.why_not(self.prior, self.device) if reason is None else reason


def choose(name: str, prior: Prior, options: EngineOptions) -> tuple[Engine[Any], str]:
    """The engine that would fill this prior's grids, and why that one; see :func:`choose_engine`."""
    candidate = _Candidate(prior)
    if name == "auto":
        passed: list[str] = []
        for engine in ENGINES:
            reason = candidate.why_not(engine)
            if reason is None:
                why = "; ".join([*passed, f"{engine.name} is the fastest that runs here"])
                break
            passed.append(f"{engine.name}: {reason}")
        else:
            raise UnavailableError(f"engine: none can run here: {reason}")
    else:
        engine = engine_named(name)
        reason = candidate.why_not(engine)
        if reason is not None:
            raise UnavailableError(f"engine: {name!r} was asked for but cannot run here: {reason}")
        why = "asked for by name"
    _check(engine, options, candidate.device)
    if options.tile is not None:
        plan_of(prior).front(options.tile)
    return engine, why


def _check(engine: Engine[Any], options: EngineOptions, device: torch.device | None = None) -> None:
    """Refuse what an engine does not have; see :meth:`Engine.check`."""
    precision = options.precision
    if precision not in engine.precisions:
        having = " and ".join(other.name for other in ENGINES if precision in other.precisions)
        raise ArgumentError(
            f"precision: only the {having} engines have {precision} weights, the engine here is {engine.name!r}"
        )
    engine.check(options, device)


def choose_engine(
    engine: str, prior: Prior, precision: Precision = "float32", options: EngineOptions | None = None
) -> tuple[str, str]:
    """Name of the engine that would fill this prior's grids, and why that one.

    Args:
        engine, prior, precision, options: as of :func:`fastvq.sample`.

    Raises:
        ArgumentError: there is no engine of that name, or it does not have the precision or the options.
        UnavailableError: the engine asked for, or what the options ask of it, cannot run this prior here.
    """
    chosen, why = choose(engine, prior, engine_options(precision, options))
    return chosen.name, why


def why_slow(asked: str, chosen: Engine[Any], prior: Prior) -> str | None:
    """Why an engine without a plan was taken for a prior of a class that plans are known for, or None if it was not."""
    if asked != "auto" or chosen.plans or not has_writer(prior):
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


def fill(
    engine: str,
    prior: Prior,
    request: SampleRequest,
    row_done: RowDone,
    options: EngineOptions | None = None,
    *,
    evaluated: Prior | None = None,
    on_phase: OnPhase | None = None,
) -> Tensor:
    """Fill the grids of one micro-batch with a chosen engine: int64 [n, H, W].

    Args:
        row_done: called with the number of rows, from the top, that have become complete in all samples since the last
            call, and the grids [n, H, W] in which they are; what lies below may change yet.
        evaluated: what the engine's `evaluated` gives, for callers that fill several.
        on_phase: called with ``"row phase"`` or ``"step phase"`` and the seconds that it took, for each row of each, or
            each tile step of a front. On a GPU these are seconds of the device, all told at the end of the grid. The
            naive engine and grids that are replayed as a CUDA graph have no such phases.

    Raises:
        ArgumentError: options that this engine does not have, weights or logits that are not finite.
    """
    chosen, options = engine_named(engine), options or EngineOptions()
    _check(chosen, options)
    evaluated = chosen.evaluated(prior) if evaluated is None else evaluated
    device = request.noise.device
    with torch.inference_mode(), full_float32(device), _repeatable(device):
        prepared = chosen.prepare(prior, len(request.noise), options)
        return chosen.fill(prepared, evaluated, request, row_done, on_phase)


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
