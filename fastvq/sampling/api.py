"""``fastvq.sample``: codes from a prior."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvq._check import require_positive_int
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.prior import Condition, Prior
from fastvq.sampling.naive import sample_naive
from fastvq.sampling.request import MICRO_BATCH, Engine, Settings, build_request, micro_batches

ENGINES: dict[str, Engine] = {"naive": sample_naive}


def choose_engine(engine: str, prior: Prior) -> tuple[str, str]:
    """Name of the engine that would fill this prior's grids, and why.

    Raises:
        ArgumentError: there is no engine of that name.
    """
    if engine == "auto":
        return "naive", "it is the only engine, and it runs every prior on every device"
    if engine not in ENGINES:
        raise ArgumentError(f"engine: expected 'auto' or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    return engine, "asked for by name"


def sample(
    prior: Prior,
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
    micro_batch: int = MICRO_BATCH,
) -> Tensor:
    """Draw grids of codes from a prior.

    Args:
        prior: any prior of :mod:`fastvq.models`, on any device. It is evaluated without dropout.
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
        engine: ``naive`` or ``auto``.
        start: index of the first sample; sampling 0..9 in one call or in two gives the same codes.
        micro_batch: samples computed together, aligned on the sample's index and padded. Codes are bit-identical
            between calls with the same ``micro_batch``; with another one, logits may differ by float32 rounding.

    Returns:
        int64 [n, H, W] on the prior's device.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that do not fit; nothing has been computed then.
    """
    if not isinstance(prior, Prior):
        raise ArgumentTypeError(f"prior: expected a prior of fastvq.models, got {type(prior).__name__}")
    require_positive_int("micro_batch", micro_batch)
    run = ENGINES[choose_engine(engine, prior)[0]]
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
    codes = torch.empty_like(request.init_codes)
    blocks = list(micro_batches(start, n, micro_batch))
    bar = tqdm(total=len(blocks) * prior.config.shape[0], desc="sampling", unit="row", disable=not progress)
    with evaluating(prior), bar:
        for index, new in blocks:
            filled = run(prior, request.rows(index.to(codes.device)), bar.update)
            codes[index[new].to(codes.device)] = filled[new]
    return codes


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode inside the block; the mode of every submodule is put back afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
