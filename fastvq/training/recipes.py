"""What each preset is meant for: image size, batch, learning rate and steps to start from, and times measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How long training with a recipe took.

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
    """Settings of training to start from, as :class:`fastvq.training.TrainConfig` calls them."""

    batch_size: int
    learning_rate: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset is meant for.

    Attributes:
        size: (H, W) of the images, of an autoencoder or of the one whose codes a prior learns.
        vqvae: of a prior: the autoencoder's preset.
        level: of a prior: 0 for the top.
        schedule: None: none was tried here, and training takes nothing from the recipe.
        measured: of training as the schedule says.
    """

    size: tuple[int, int]
    vqvae: str | None = None
    level: int | None = None
    schedule: Schedule | None = None
    measured: tuple[Measured, ...] = ()


RECIPES: Mapping[str, Recipe] = {
    "imagenet128": Recipe(size=(128, 128)),
    "imagenet128-pixelcnn": Recipe(size=(128, 128), vqvae="imagenet128", level=0),
    "imagenet256": Recipe(size=(256, 256)),
    "imagenet256-top": Recipe(size=(256, 256), vqvae="imagenet256", level=0),
    "imagenet256-bottom": Recipe(size=(256, 256), vqvae="imagenet256", level=1),
    "ffhq1024": Recipe(size=(1024, 1024)),
    "ffhq1024-top": Recipe(size=(1024, 1024), vqvae="ffhq1024", level=0),
    "ffhq1024-mid": Recipe(size=(1024, 1024), vqvae="ffhq1024", level=1),
    "ffhq1024-bottom": Recipe(size=(1024, 1024), vqvae="ffhq1024", level=2),
    # Of the digits that ship with the package.
    "digits": Recipe(size=(32, 32), schedule=Schedule(batch_size=64, learning_rate=2e-3, steps=4000)),
    "digits-top": Recipe(
        size=(32, 32), vqvae="digits", level=0, schedule=Schedule(batch_size=128, learning_rate=1e-3, steps=3000)
    ),
    "digits-bottom": Recipe(
        size=(32, 32), vqvae="digits", level=1, schedule=Schedule(batch_size=128, learning_rate=1e-3, steps=4000)
    ),
}


def prior_preset(vqvae: str, level: int) -> str | None:
    """The preset of a prior over a level of the codes of an autoencoder's preset, if one is meant for them."""
    found = (name for name, recipe in RECIPES.items() if (recipe.vqvae, recipe.level) == (vqvae, level))
    return next(found, None)
