"""``fastvq.sample``: codes from a prior."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvq import _engine
from fastvq._nvtx import annotate
from fastvq.models.prior import Condition, Prior
from fastvq.sampling.engines import Engine, choose, fill, plan_of, warn_slow, why_slow
from fastvq.sampling.micro_batch import choose_micro_batch
from fastvq.sampling.options import EngineOptions, Precision, engine_options
from fastvq.sampling.request import (
    SampleRequest,
    Settings,
    as_prior,
    build_request,
    check_indices,
    micro_batches,
    padded_micro_batches,
)


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
    label: int | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
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
) -> Tensor:
    """Draw grids of codes from a prior.

    Args:
        prior: any prior of :mod:`fastvq.models`, on any device, or a prior of another project that
            :mod:`fastvq.interop` knows, also inside torch.compile, DataParallel, DistributedDataParallel or
            AveragedModel. It is evaluated without dropout.
        n: number of samples, 0 or more.
        condition: codes of the levels above, int [n, h, w]; a sequence of them, top first, if there are several.
        label: class of all samples, or int [n]; for class-conditional priors.
        temperature: logits are divided by it; positive.
        top_k: keep only this many of the likeliest codes.
        top_p: keep only the likeliest codes that together reach this probability, in (0, 1].
        seed: 0..2**64-1. Sample i depends on (seed, i, level of the prior) and on nothing else. None draws one from
            PyTorch's global generator.
        noise: the uniform numbers themselves instead of a seed, float32 [n, H, W] in [0, 1).
        init_codes, mask: in-painting. Where ``mask`` (bool [n, H, W] or [H, W]) is True the code of ``init_codes``
            (int [n, H, W]) is kept.
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

    Returns:
        int64 [n, H, W] on the prior's device.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
    """
    prior = as_prior(prior, shape=shape, num_codes=num_codes, num_classes=num_classes)
    check_indices(n, start)
    run = Run.chosen(prior, n, engine, engine_options(precision, options), micro_batch, memory_limit)
    request = build_request(
        prior,
        n,
        condition=condition,
        label=label,
        settings=Settings(temperature, top_k, top_p),
        seed=seed,
        noise=noise,
        init_codes=init_codes,
        mask=mask,
        start=start,
    )
    warn_slow([] if run.slow is None else [run.slow], stacklevel=3)  # past the decorator
    return run.draw(request, start, progress=progress)


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

    def draw(self, request: SampleRequest, start: int, *, progress: bool) -> Tensor:
        """Codes of a request for samples from index ``start`` on: int64 [n, H, W]."""
        codes = torch.empty_like(request.init_codes)
        blocks: list[tuple[Tensor | slice, slice]]
        if self.padded:
            padded = padded_micro_batches(start, len(codes), self.micro_batch)
            blocks = [(index.to(codes.device), new) for index, new in padded]
        else:
            blocks = [(part, slice(None)) for part in micro_batches(len(codes), self.micro_batch)]
        rows = len(blocks) * self.prior.config.shape[0]
        evaluated = self.engine.evaluated(self.prior)
        with tqdm(total=rows, desc="sampling", unit="row", disable=not progress) as bar, annotate("sample"):
            for index, new in blocks:
                part = request.rows(index)
                filled = fill(self.engine.name, self.prior, part, bar.update, self.options, evaluated=evaluated)
                codes[index if isinstance(index, slice) else index[new]] = filled[new]
        return codes
