"""Random shifts and flips that depend on nothing but a seed, the image's index and a variant number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastvq._check import require_bool, require_positive_int, require_shape
from fastvq.data.base import DOMAIN_AUGMENT, random_words
from fastvq.errors import ArgumentError


@dataclass(frozen=True)
class Augment:
    """Which changes an image may undergo. Variant 0 of an image is the image itself.

    Args:
        max_shift: shift by a whole number of pixels in -max_shift..max_shift, each axis on its own; pixels that come
            into view repeat the edge.
        horizontal_flip: mirror left to right in half of the variants.
    """

    max_shift: int = 0
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_shift", require_positive_int("max_shift", self.max_shift, minimum=0))
        require_bool("horizontal_flip", self.horizontal_flip)

    def __call__(self, image: Tensor, *, seed: int, index: int, variant: int) -> Tensor:
        """A variant of one image [C, H, W], a function of (seed, index, variant) alone.

        Raises:
            ArgumentError: it is smaller than ``max_shift``, or numbers are negative.
        """
        require_shape("image", image, ("C", "H", "W"))
        return self.batch(image[None], seed=seed, indices=np.array([index]), variants=np.array([variant]))[0]

    def batch(self, images: Tensor, *, seed: int, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """Variants of a batch of images.

        Args:
            images: [B, C, H, W].
            seed: in 0..2**63-1.
            indices, variants: int arrays [B], not negative.

        Raises:
            ArgumentError: shapes or numbers that do not fit.
        """
        require_shape("images", images, ("B", "C", "H", "W"))
        batch, _, height, width = images.shape
        if indices.shape != (batch,) or variants.shape != (batch,):
            raise ArgumentError(
                f"indices and variants: expected shape ({batch},), got {indices.shape} and {variants.shape}"
            )
        if batch and (indices.min() < 0 or variants.min() < 0):
            raise ArgumentError(
                f"indices and variants: must not be negative, got {indices.min()} and {variants.min()} as the least"
            )
        if self.max_shift >= min(height, width):
            raise ArgumentError(f"max_shift: {self.max_shift} is not smaller than the image, {height} x {width}")
        changed = variants > 0
        if not changed.any() or not (self.max_shift or self.horizontal_flip):
            return images

        words = np.zeros((batch, 4), dtype=np.uint64)
        for b in np.flatnonzero(changed):
            words[b] = random_words(seed, int(variants[b]), DOMAIN_AUGMENT, int(indices[b]), 1)[0]
        shifts = (words[:, :2] % np.uint64(2 * self.max_shift + 1)).astype(np.int64) - self.max_shift
        shifts[~changed] = 0
        flips = changed & (words[:, 2] % np.uint64(2) == 1) & self.horizontal_flip

        rows = np.clip(np.arange(height) - shifts[:, :1], 0, height - 1)  # [B, H]
        columns = np.clip(np.arange(width) - shifts[:, 1:], 0, width - 1)  # [B, W]
        columns[flips] = columns[flips, ::-1]
        samples = torch.arange(batch)[:, None, None]
        # Indexing a channels-last view gathers whole pixels, and gives [B, H, W, C].
        moved = images.movedim(1, -1)[samples, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None]]
        return moved.movedim(-1, 1).contiguous()
