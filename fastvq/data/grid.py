"""Grids of images as one picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq._files import replacing_file
from fastvq.errors import ArgumentError, FileConflictError


def image_grid(images: Tensor, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Images side by side, row by row, on white.

    Args:
        images: float [N, C, H, W] in [-1, 1] (values outside are clipped), C = 1 or 3.
        columns: images per row; by default as square as it gets.
        padding: white pixels between images and around them.

    Returns:
        uint8 [rows * (H + padding) + padding, columns * (W + padding) + padding, 3], or without the last axis if C = 1.
    """
    require_floating("images", require_tensor("images", images))
    require_shape("images", images, ("N", "C", "H", "W"))
    count, channels, height, width = images.shape
    if count == 0 or channels not in (1, 3):
        raise ArgumentError(f"images: expected at least one image of 1 or 3 channels, got shape {list(images.shape)}")
    require_positive_int("padding", padding, minimum=0)
    columns = math.ceil(math.sqrt(count)) if columns is None else require_positive_int("columns", columns)
    rows = -(-count // columns)
    pixels = images.detach().float().nan_to_num(0.0).clamp(-1, 1).add(1).mul(127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).cpu()  # [N, H, W, C]
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8
    )
    for index, image in enumerate(pixels.numpy()):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image
    return canvas[..., 0] if channels == 1 else canvas


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    columns: int | None = None,
    *,
    padding: int = 2,
    overwrite: bool = False,
) -> Path:
    """Write :func:`image_grid` as a PNG, whole or not at all; returns the path.

    Raises:
        FileConflictError: the file exists and ``overwrite`` is False.
        ArgumentError: the name does not end in ``.png``, or the images do not fit.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ArgumentError(f"path: expected a name that ends in .png, got {path}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileConflictError(f"path: {path} exists already; nothing was written")
    picture = Image.fromarray(image_grid(images, columns, padding))
    with replacing_file(path) as temporary:
        picture.save(temporary, format="PNG")
    return path
