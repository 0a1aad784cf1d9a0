"""What each preset is meant for: image size, batch, learning rate and steps to start from, and times measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How long training took, with a recipe's preset, size and batch.

    Attributes:
        device: such as ``NVIDIA H100`` or ``2 CPU cores``; part of what :func:`fastvq.training.machine.device_title`
            says of a device of the kind.
        seconds: per 1000 optimiser steps.
        source: where the recorded run is, below the root of the repository.
    """

    device: str
    seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings of training to start from, as :class:`fastvq.training.TrainConfig` calls them, and what they take.

    Attributes:
        memory: in GB, what :func:`fastvq.training.training_memory` says, to be looked up and not counted for a list.
    """

    batch_size: int
    learning_rate: float
    steps: int
    memory: float

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of a TrainConfig."""
        return {"batch_size": self.batch_size, "learning_rate": self.learning_rate, "steps": self.steps}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset is meant for.

    Attributes:
        size: (H, W) of the images, of an autoencoder or of the one whose codes a prior learns.
        vqvae: of a prior: the autoencoder's preset.
        level: of a prior: 0 for the top.
        schedule: None: none was tried here, and training takes nothing from the recipe.
    """

    size: tuple[int, int]
    vqvae: str | None = None
    level: int | None = None
    schedule: Schedule | None = None


def _family(name: str, side: int, vqvae: Schedule | None, *priors: tuple[str, Schedule | None]) -> dict[str, Recipe]:
    """An autoencoder's preset for square images, and those of its priors, top first: end of the name and schedule."""
    size = (side, side)
    return {
        name: Recipe(size=size, schedule=vqvae),
        **{
            f"{name}-{end}": Recipe(size=size, vqvae=name, level=level, schedule=schedule)
            for level, (end, schedule) in enumerate(priors)
        },
    }


def _photos(name: str, side: int, batch: int, memory: tuple[float, float, float]) -> dict[str, Recipe]:
    of_vqvae, of_top, of_bottom = memory
    prior = Schedule(batch_size=batch, learning_rate=3e-4, steps=50_000, memory=of_top)
    vqvae = Schedule(batch_size=batch, learning_rate=3e-4, steps=20_000, memory=of_vqvae)
    return _family(name, side, vqvae, ("top", prior), ("bottom", dataclasses.replace(prior, memory=of_bottom)))


RECIPES: Mapping[str, Recipe] = {
    **_family("imagenet128", 128, None, ("pixelcnn", None)),
    **_family("imagenet256", 256, None, ("top", None), ("bottom", None)),
    **_family("ffhq1024", 1024, None, ("top", None), ("mid", None), ("bottom", None)),
    **_photos("photos64", 64, 64, (0.22, 0.341, 0.813)),
    **_photos("photos128", 128, 32, (0.411, 1.33, 2.94)),
    **_photos("photos256", 256, 16, (0.793, 4.3, 9.24)),
    **_family(
        "emoji",
        64,
        Schedule(batch_size=64, learning_rate=1e-3, steps=6000, memory=0.167),
        ("top", Schedule(batch_size=64, learning_rate=1e-3, steps=8000, memory=0.209)),
        ("bottom", Schedule(batch_size=64, learning_rate=1e-3, steps=8000, memory=0.526)),
    ),
    # Those of the digits that ship with the package.
    **_family(
        "digits",
        32,
        Schedule(batch_size=64, learning_rate=2e-3, steps=4000, memory=0.0237),
        ("top", Schedule(batch_size=128, learning_rate=1e-3, steps=3000, memory=0.0137)),
        ("bottom", Schedule(batch_size=128, learning_rate=1e-3, steps=4000, memory=0.0544)),
    ),
}
_H200 = "bench/results/gpu/2026-11-27-h200-04ffd64-training.txt"
_CPU = "bench/results/training/2026-11-28-cpu-photos64.txt"
# By preset.
MEASURED: Mapping[str, tuple[Measured, ...]] = {
    "photos64": (Measured(device="2 CPU cores", seconds=323, source=_CPU),),
    "photos64-top": (Measured(device="2 CPU cores", seconds=360, source=_CPU),),
    "photos64-bottom": (Measured(device="2 CPU cores", seconds=1170, source=_CPU),),
    "emoji": (Measured(device="NVIDIA H200", seconds=14, source=_H200),),
    "emoji-top": (Measured(device="NVIDIA H200", seconds=8.5, source=_H200),),
    "emoji-bottom": (Measured(device="NVIDIA H200", seconds=17, source=_H200),),
}


def prior_preset(vqvae: str, level: int) -> str | None:
    """The preset of a prior over a level of the codes of an autoencoder's preset, if one is meant for them."""
    found = (name for name, recipe in RECIPES.items() if (recipe.vqvae, recipe.level) == (vqvae, level))
    return next(found, None)
