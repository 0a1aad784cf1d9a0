"""Handwritten digits that ship inside scikit-learn: real data without a download."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.data.base import require_size
from fastvq.errors import UnavailableError


class Digits:
    """1797 handwritten digits in ten classes, 8 x 8 pixels upscaled bicubically; one channel.

    Source: the test part of UCI's "Optical Recognition of Handwritten Digits", as in ``sklearn.datasets.load_digits``.

    Args:
        size: an int for a square, or (H, W).

    Raises:
        UnavailableError: scikit-learn is not installed.
    """

    channels = 1
    num_classes = 10
    class_names = tuple("0123456789")

    labels: Tensor | None

    def __init__(self, size: int | tuple[int, int] = 32) -> None:
        self.size = require_size("size", size)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UnavailableError(
                f'the digits come with scikit-learn, which cannot be imported ({error}); pip install "fastvq[demo]"'
            ) from error
        bunch = load_digits()
        original = torch.from_numpy(bunch.images).float()[:, None]  # [N, 1, 8, 8] in 0..16
        upscaled = F.interpolate(original, self.size, mode="bicubic", align_corners=False, antialias=True)
        self._pixels = (upscaled / 8 - 1).clamp(-1, 1)
        self._hash = hashlib.sha256(bunch.images.tobytes() + bunch.target.tobytes()).hexdigest()
        self.labels = torch.from_numpy(bunch.target).long()

    def __len__(self) -> int:
        return self._pixels.shape[0]

    def image(self, index: int) -> Tensor:
        """Digit number ``index``: float32 [1, H, W] in [-1, 1]."""
        return self._pixels[index].clone()

    def fingerprint(self) -> str:
        """A hash of the pictures, the labels and the size, the same in every process."""
        return f"digits-{self.size[0]}x{self.size[1]}-{self._hash}"
