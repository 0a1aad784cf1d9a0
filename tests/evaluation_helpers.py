"""Images, models and samples small enough to know every answer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import snail
from torch import Tensor, nn

from fastvq import Pipeline
from fastvq.models import VQVAE2, VQVAEConfig
from fastvq.sampling import Shard, sample_shard


class Images:
    """Images and labels from tensors."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None, name: str = "images") -> None:
        self.pixels, self.labels, self.name = pixels, labels, name
        self.channels, self.size = pixels.shape[1], (pixels.shape[2], pixels.shape[3])
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.class_names = tuple(str(label) for label in range(self.num_classes or 0))

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        return self.pixels[index]

    def fingerprint(self) -> str:
        return self.name


class ReadableVQVAE(VQVAE2):
    """Codes of 4 x 4 images are written in their pixels: 0, 1, 2 as -1, 0, 1. The top code is the pixel at (3, 3)."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            VQVAEConfig(in_channels=1, channels=4, residual_channels=4, num_codes=3, code_dim=2, strides=(2, 2))
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        codes = (images[:, 0] + 1).round().long()
        return codes[:, 3:, 3:], codes[:, :3:2, :3:2]


def all_grids() -> Tensor:
    """An image [3^5, 1, 4, 4] for every pair of a 1 x 1 top and a 2 x 2 bottom grid of three codes."""
    images = torch.zeros(3**5, 1, 4, 4)
    for image, (top, *bottom) in zip(images, itertools.product((-1.0, 0.0, 1.0), repeat=5), strict=True):
        image[0, 3, 3] = top
        image[0, :3:2, :3:2] = torch.tensor(bottom).reshape(2, 2)
    return images


def readable_pipeline(num_classes: int | None = None) -> Pipeline:
    """Priors with random weights, sharpened so that grids differ in probability, over :class:`ReadableVQVAE`."""
    torch.manual_seed(1)
    top = snail(shape=(1, 1), num_codes=3, num_classes=num_classes)
    above: dict[str, Any] = {"level": 1, "condition_shapes": ((1, 1),), "condition_num_codes": (3,)}
    bottom = snail(shape=(2, 2), num_codes=3, num_classes=num_classes, **above)
    for prior in (top, bottom):
        for parameter in prior.parameters():
            parameter.data *= 2
    return Pipeline(ReadableVQVAE().eval(), [top, bottom])


class Flatten(nn.Module):
    """Pixels as features; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self._calls = [0]

    @property
    def calls(self) -> int:
        return self._calls[0]

    def forward(self, images: Tensor) -> Tensor:
        self._calls[0] += 1
        return images.flatten(1) * self.scale


class Ripples(nn.Module):
    """Logits that swing with an image's brightness, so that each class finds some images likely and some not."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(-3, 3, classes))

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(400 * images.mean((1, 2, 3)))[:, None] * self.slopes


class Points:
    """Samples that are points of the plane, as images [1, 1, 2]."""

    num_classes = 2

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.labels = torch.zeros(len(points), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices: np.ndarray) -> Tensor:
        return self.points[torch.from_numpy(indices)][:, None, None]


def gaussian(n: int, features: int = 3, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator) * scale + shift


def write_samples(pipeline: Pipeline, folder: Path, n: int, parts: int, **settings: Any) -> None:
    """Samples in a folder of parts."""
    for index in range(parts):
        sample_shard(pipeline, n, Shard(index, parts), folder, **settings)
