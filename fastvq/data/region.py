"""One picture as a model sees it, and the region of it that a box or a mask picture means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastvq.data.images import MAX_PIXELS
from fastvq.data.pictures import PictureRules, formats_of, picture_types, read_picture, read_whole
from fastvq.errors import ArgumentError, MissingFileError

# Of a mask picture's grey values.
_WHITE = 128


def load_picture(path: str | os.PathLike[str], size: tuple[int, int], *, channels: int = 3) -> Tensor:
    """A picture as :class:`ImageFolder` gives it, upright, cropped at the centre and resized: [1, C, H, W] in [-1, 1].

    Args:
        path: its file.
        size: (H, W) in pixels.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: it cannot be read.
    """
    pixels, _ = read_picture(_file("image", path), size, channels, _rules())
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)[None].contiguous()


def box_region(path: str | os.PathLike[str], box: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Where a box lies in a picture of :func:`load_picture`: bool [H, W], True at every pixel that it touches.

    Args:
        path: the picture's file.
        box: x, y, width and height in pixels of the picture in the file, upright, from its upper left corner.
        size: (H, W).

    Raises:
        ArgumentError: the box does not lie in the picture, or where all of it is cropped away.
        MissingFileError, CorruptFileError: there is no picture, or it cannot be read.
    """
    height, width = read_whole(_file("image", path), _rules()).shape
    x, y, w, h = box
    if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
        raise ArgumentError(
            f"box: expected X Y WIDTH HEIGHT of a box in {path}, {width} pixels wide and {height} high; "
            f"got {x} {y} {w} {h}"
        )
    region = np.zeros((height, width), bool)
    region[y : y + h, x : x + w] = True
    return _fitted("box", region, size)


def mask_region(path: str | os.PathLike[str], mask: str | os.PathLike[str], size: tuple[int, int]) -> Tensor:
    """Where the white of a mask lies in a picture of :func:`load_picture`: bool [H, W], True at every pixel it touches.

    Args:
        path: the picture's file.
        mask: a picture of the same width and height as the one at ``path``; light grey (from 128) counts as white, and
            so does what is transparent.
        size: (H, W).

    Raises:
        ArgumentError: the mask has another size, or no white, or all of it is cropped away.
        MissingFileError, CorruptFileError: there is no picture or no mask, or it cannot be read.
    """
    there = read_whole(_file("image", path), _rules())
    region = read_whole(_file("mask", mask), _rules())
    if there.shape != region.shape:
        sizes = [f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels in (there, region)]
        raise ArgumentError(f"mask: expected {sizes[0]} pixels as {path} has, got {sizes[1]}")
    if region.max() < _WHITE:
        raise ArgumentError(f"mask: {mask} is black all over; white says what to paint")
    return _fitted("mask", region >= _WHITE, size)


def _file(name: str, path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_file():
        raise MissingFileError(f"{name}: no file {path}")
    return Path(path)


def _rules() -> PictureRules:
    return PictureRules(formats_of(picture_types()), MAX_PIXELS)


def _fitted(name: str, region: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A region of a file's pixels, cropped and resized as the picture is."""
    share = ImageOps.fit(Image.fromarray(region.astype(np.float32)), (size[1], size[0]), Image.Resampling.BOX)
    fitted = torch.from_numpy(np.asarray(share) > 0)
    if not bool(fitted.any()):
        raise ArgumentError(
            f"{name}: all of it is cropped away; of the picture the middle is used, of the shape {size[1]} : {size[0]}"
        )
    return fitted
