"""``fastvq.sample``: codes from a prior."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvq import _engine
from fastvq._bar import bar
from fastvq._check import require_bool
from fastvq._evaluation import in_evaluation
from fastvq._nvtx import annotate
from fastvq._precision import full_float32
from fastvq.errors import ArgumentTypeError
from fastvq.models.prior import Condition, Prior
from fastvq.sampling.engines import Engine, choose, fill, plan_of, warn_slow, why_slow
from fastvq.sampling.micro_batch import LEAST_MICRO_BATCH, choose_micro_batch
from fastvq.sampling.noise import Seed
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.request import (
    Labels,
    SampleRequest,
    Settings,
    as_prior,
    build_request,
    check_indices,
    micro_batches,
)

Callback = Callable[[int, Tensor], object]


@contextlib.contextmanager
def living_threads() -> Iterator[None]:
    """In a child of fork one thread of PyTorch: it would wait forever for the others, which only the parent has."""
    if not _engine.forked():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@living_threads()
def sample(
    prior: Prior | nn.Module,
    n: int,
    *,
    condition: Condition = None,
    label: Labels | None = None,
    temperature: float | Sequence[float] | np.ndarray | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Seed | None = None,
    noise: Tensor | None = None,
    init_codes: Tensor | None = None,
    mask: Tensor | None = None,
    progress: bool = False,
    engine: str = "auto",
    start: int = 0,
    micro_batch: int | None = None,
    memory_limit: int | None = None,
    precision: Precision = "float32",
    options: EngineOptions | None = None,
    shape: tuple[int, int] | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
    callback: Callback | None = None,
    return_logprobs: bool = False,
) -> Any:
    """Draw grids of codes from a prior.

    Args:
        prior: any prior of :mod:`fastvq.models`, on any device, or a prior of another project that
            :mod:`fastvq.interop` knows, also inside torch.compile, DataParallel, DistributedDataParallel or
            AveragedModel. It is evaluated without dropout.
        n: number of samples, 0 or more.
        condition: codes of the levels above, int [n, h, w], or [1, h, w] for all samples; a sequence of them, top
            first, if there are several.
        label: class of all samples, or that of each, int [n], as a sequence, an array or a tensor; for
            class-conditional priors.
        temperature: logits are divided by it; 0 takes the likeliest code at each position (the lowest among equals),
            whatever top_k, top_p and the seed are. One for each sample may come as a sequence, an array or a tensor;
            then those of one temperature are computed together.
        top_k: keep only this many of the likeliest codes.
        top_p: keep only the likeliest codes that together reach this probability, in (0, 1].
        seed: any integer, taken modulo 2**64. Sample i depends on (seed, i, level of the prior) and on nothing else.
            A ``torch.Generator`` gives a new seed with every call, and the same again once it is seeded again; None
            draws one from PyTorch's global generator.
        noise: the uniform numbers themselves instead of a seed, float32 [n, H, W] in [0, 1).
        init_codes, mask: in-painting. Where ``mask`` (bool [n, H, W] or [H, W]) is True the code of ``init_codes``
            (int [n, H, W]) is kept. Either may be [H, W] or [1, H, W] for all samples.
        progress: show a progress bar on stderr.
        engine: ``cuda`` (cached, priors on an NVIDIA GPU), ``cpu`` (cached, C++), ``torch`` (cached, any device),
            ``naive``, or ``auto`` for the first of these that can run here, with a
            :class:`fastvq.errors.NaiveEngineWarning` where only ``naive`` can because the prior is a changed PixelSNAIL
            or GatedPixelCNN. All give the same codes, except where a uniform number lies within float32 rounding of a
            boundary between two codes.
        start: index of the first sample; sampling 0..9 in one call or in two gives the same codes.
        micro_batch: most samples computed together, a means against memory; the default is what is fastest within the
            memory limit. The codes of a sample do not depend on it with the ``cpu`` engine, nor on threads or on the
            other samples of a call, and processors with AVX2 or AVX-512 give the same. The same holds for the ``cuda``
            engine on one GPU, unless library convolutions do the row phase of a prior with attention or of the gated
            PixelCNN (see :class:`fastvq.sampling.EngineOptions`): then samples are padded to micro-batches of one size,
            and depend on that size by rounding. With the ``torch`` and ``naive`` engines, whose library rounds
            differently for other batches, logits may differ by float32 rounding between micro-batches.
        memory_limit: bytes that a cached engine may use beyond the prior itself (see :func:`fastvq.explain`). Without
            one a micro-batch of more than 8 samples takes no more than 2 GiB.
        precision: ``bfloat16`` halves the weights that the ``cuda`` and ``cpu`` engines read at each position. Faster
            for small micro-batches, and not exact; the ``cuda`` engine also rounds what the weights are multiplied by.
        options: everything an engine can be told, ``precision`` included (then leave that argument out): threads,
            instruction set, row phase, tile, CUDA graph.
        shape, num_codes, num_classes: grid (H, W), codes and classes of a module or function that is no prior, see
            :func:`fastvq.trace`.
        callback: called with ``(rows_done, codes)`` whenever rows are complete: how many of the n * H rows of all
            grids, and the tensor that will be returned, int64 [n, H, W], in which what is not drawn yet is -1. It goes
            on to be filled, so clone what is to be kept. Returning False ends sampling, and what there is is returned;
            what the callback raises passes through. Micro-batches are drawn one after the other, each from the top.
            Where a CUDA graph would hold the grid, rows are enqueued one by one instead.
        return_logprobs: also return how likely each code was, see below; takes a pass of the prior more.

    Returns:
        int64 [n, H, W] on the prior's device. With ``return_logprobs`` a pair of that and of float32 [n, H, W]: the
        log-probability of each code given those before it, under the prior itself: at temperature 1, of all codes, in
        float32; of known codes as well, and NaN where sampling was ended before.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
    """
    prior = as_prior(prior, shape=shape, num_codes=num_codes, num_classes=num_classes)
    n, start = check_indices(n, start)
    run = Run.chosen(prior, n, engine, engine_options(precision, options), micro_batch, memory_limit)
    require_callback(callback)
    require_bool("return_logprobs", return_logprobs)
    request = build_request(
        prior,
        n,
        condition=condition,
        label=label,
        settings=Settings.of(temperature, top_k, top_p, n),
        seed=seed,
        noise=noise,
        init_codes=init_codes,
        mask=mask,
        start=start,
    )
    warn_slow([] if run.slow is None else [run.slow], stacklevel=3)  # past the decorator
    codes = run.draw(request, start, progress=progress, callback=callback)
    return (codes, run.log_probabilities(request.condition, request.label, codes)) if return_logprobs else codes


@dataclass(frozen=True)
class Run:
    """How a prior's grids will be filled, decided before anything is drawn.

    Attributes:
        micro_batch: samples computed together.
        padded: whether all micro-batches have this size, with samples nobody asked for where there are too few.
        slow: why this will take long, if that has to be said.
    """

    prior: Prior
    engine: Engine[Any]
    options: EngineOptions
    micro_batch: int
    padded: bool
    slow: str | None

    @classmethod
    def chosen(
        cls,
        prior: Prior,
        n: int,
        engine: str,
        options: EngineOptions,
        micro_batch: int | None,
        memory_limit: int | None,
    ) -> Run:
        """
        Args:
            n: samples that are wanted.

        Raises:
            ArgumentError: arguments that do not fit the prior or each other, see :func:`sample`.
            UnavailableError: the engine asked for cannot run here.
        """
        found, _ = choose(engine, prior, options)
        plan = plan_of(prior) if found.plans else None
        size = choose_micro_batch(plan, found, options, n, micro_batch, memory_limit)
        padded = plan is not None and found.padded(plan, options)
        return cls(prior, found, options, size, padded, why_slow(engine, found, prior))

    def draw(
        self, request: SampleRequest, start: int, *, progress: bool = False, callback: Callback | None = None
    ) -> Tensor:
        """Codes of a request for samples from index ``start`` on: int64 [n, H, W].

        Args:
            callback: see :func:`sample`; what is not drawn when it says False is -1.
        """
        device, rows = request.init_codes.device, self.prior.config.shape[0]
        codes = torch.where(request.known, request.init_codes, -1)
        parts = request.parts(size=self.micro_batch, start=start, padded=self.padded)
        evaluated = self.engine.evaluated(self.prior)
        # A graph of a whole grid tells of no row before all are done.
        options = self.options if callback is None else dataclasses.replace(self.options, cuda_graph=False)
        total = 0
        with (
            bar("sampling", show=progress, total=len(parts) * rows, unit="row") as shown,
            annotate("sample"),
            contextlib.suppress(_StoppedError),
        ):
            for settings, *places in parts:
                index, new, place = (where.to(device) for where in places)
                part = dataclasses.replace(request.rows(index), settings=settings)
                done = 0

                def row_done(count: int, grids: Tensor, new: Tensor = new, place: Tensor = place) -> None:
                    nonlocal done, total
                    shown.update(count)
                    if callback is None:
                        return
                    codes[place, done : done + count] = grids[new, done : done + count]
                    done, total = done + count, total + count * len(place)
                    with torch.inference_mode(False):
                        if ends(callback(total, codes)):
                            raise _StoppedError

                filled = fill(self.engine.name, self.prior, part, row_done, options, evaluated=evaluated)
                codes[place] = filled[new]
        return codes

    @torch.no_grad()
    def log_probabilities(self, condition: Sequence[Tensor], label: Tensor | None, codes: Tensor) -> Tensor:
        """Log-probability of each code [n, H, W] under the prior, float32; NaN where it is -1.

        Args:
            condition, label: as the prior takes them, for n samples.
        """
        label = None if label is None else label.to(codes.device)
        evaluated = in_evaluation(self.prior)
        found = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        with full_float32(codes.device):
            for part in micro_batches(len(codes), min(self.micro_batch, LEAST_MICRO_BATCH)):
                above = [grids[part] for grids in condition] or None
                labels = None if label is None else label[part]
                found[part] = -evaluated.nll(codes[part].clamp(min=0), above, labels)
        return found.masked_fill(codes < 0, torch.nan)


class _StoppedError(Exception):
    """A callback has ended sampling."""


def require_callback(callback: object) -> None:
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback: expected a callable or None, got {type(callback).__name__} {callback!r}")


def ends(answer: Any) -> bool:
    """Whether an answer of a callback ends sampling: False, also as NumPy or PyTorch has it; None does not."""
    return answer is not None and not answer
