"""The cases that benchmarks run, each with a small twin for the smoke run."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import Case
from fastvq import Pipeline, PixelSNAIL
from fastvq.models import PixelSNAILConfig
from fastvq.models.prior import Prior
from fastvq.ops.causal import Mask

BATCHES = (1, 8, 32)
# In the smoke run, where it is enough that some batch is neither 1 nor a multiple of anything.
SMALL_BATCHES = {1: 1, 8: 3, 32: 7}
Grid = tuple[int, int]


@dataclass(frozen=True)
class SamplerCase(Case):
    """Sampling a batch of grids from a prior, all of them computed together (``micro_batch`` is the batch).

    Attributes:
        config: of a prior with random weights; None for the shipped digits prior of ``level``.
        small_config: of its small twin.
        full_seconds: an engine that would take longer is measured at some rows, and its time is extrapolated.
        naive_batch: the naive sampler of larger batches is measured at this one, and its time scaled.
        checked: how many samples of the batch are checked against the naive model; None for all.
        bf16_batches: where the ``cpu`` engine with bfloat16 weights is measured too.
        memory: whether peak memory is measured; of the smallest models it drowns in that of the libraries.
    """

    config: PixelSNAILConfig | None = None
    small_config: PixelSNAILConfig | None = None
    level: int = 0
    full_seconds: float = float("inf")
    naive_batch: int = 1 << 30
    checked: int | None = None
    bf16_batches: tuple[int, ...] = BATCHES
    memory: bool = True

    def small(self) -> SamplerCase:
        """The twin for the smoke run."""
        return dataclasses.replace(self, config=self.small_config, batch=SMALL_BATCHES[self.batch])

    def prior(self) -> Prior:
        """The prior in evaluation mode; the same object until another case asks for its own."""
        return _prior(self.config, self.level)

    def inputs(self, prior: Prior) -> dict[str, Any]:
        """Arguments of :func:`fastvq.sample`: random condition and labels where the prior wants them, a seed."""
        generator = torch.Generator().manual_seed(1)
        grids = zip(prior.config.condition_shapes, prior.config.condition_num_codes, strict=True)
        condition = [torch.randint(count, (self.batch, *shape), generator=generator) for shape, count in grids]
        classes = prior.config.num_classes
        label = None if classes is None else torch.arange(self.batch) % classes
        return {"condition": condition or None, "label": label, "seed": 0}


@functools.lru_cache(maxsize=1)
def _prior(config: PixelSNAILConfig | None, level: int) -> Prior:
    if config is None:
        return Pipeline.from_pretrained("digits").priors[level]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return PixelSNAIL(config).eval()


def _digits(level: int, name: str, batch: int) -> SamplerCase:
    return SamplerCase("sampling", f"digits-{name}", batch, level=level, memory=False)


def _top(shape: Grid, mask: Mask, channels: int, blocks: int, layers: int) -> PixelSNAILConfig:
    return PixelSNAILConfig(
        shape=shape,
        num_codes=512,
        channels=channels,
        residual_channels=channels,
        kernel_size=5,
        mask=mask,
        blocks=blocks,
        layers_per_block=layers,
    )


def _bottom(top: PixelSNAILConfig) -> PixelSNAILConfig:
    return dataclasses.replace(
        top,
        shape=(2 * top.shape[0], 2 * top.shape[1]),
        level=1,
        attention=False,
        condition_shapes=(top.shape,),
        condition_num_codes=(512,),
        condition_channels=top.channels,
        condition_blocks=3,
    )


def _sampler_cases() -> list[SamplerCase]:
    masks: tuple[Mask, ...] = ("strict", "inclusive")
    cases = [_digits(level, name, batch) for level, name in enumerate(("top", "bottom")) for batch in BATCHES]
    for mask in masks:
        # Names: 64 channels, 2 blocks of 4 layers.
        small, tiny = _top((16, 16), mask, 64, 2, 4), _top((3, 4), mask, 64, 2, 4)
        for place, config, twin in (("top", small, tiny), ("bottom", _bottom(small), _bottom(tiny))):
            cases += [
                SamplerCase("sampling", f"small-{mask}-{place}", batch, config, twin, full_seconds=60.0)
                for batch in BATCHES
            ]
    for mask in masks:
        default, tiny = _top((32, 32), mask, 256, 4, 4), _top((2, 3), mask, 128, 2, 1)
        for place, config, twin in (("top", default, tiny), ("bottom", _bottom(default), _bottom(tiny))):
            cases += [
                SamplerCase(
                    "sampling",
                    f"default-{mask}-{place}",
                    batch,
                    config,
                    twin,
                    full_seconds=10.0,
                    naive_batch=8,
                    checked=2,
                    bf16_batches=(1, 8),
                )
                for batch in BATCHES
            ]
    return cases


SAMPLER_CASES = _sampler_cases()
