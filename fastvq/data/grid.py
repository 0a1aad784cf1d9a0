"""Grids of images as one picture."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq._files import replacing_file
from fastvq.data.pictures import picture_types
from fastvq.errors import ArgumentError, FileConflictError

if TYPE_CHECKING:
    from PIL import Image

# How pictures are written, by the ending of their name: Pillow's format and its options.
PICTURES: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}
_LARGEST = {"PNG": 2**31 - 1, "JPEG": 65_535, "WEBP": 16_383}  # pixels of a side
_LETTERS = 11  # pixels, of captions


def grid_size(
    count: int,
    height: int,
    width: int,
    columns: int | None = None,
    padding: int = 2,
    captions: Sequence[str] | None = None,
) -> tuple[int, int, int]:
    """Height and width in pixels, and columns, of the picture that :func:`image_grid` makes."""
    require_positive_int("padding", padding, minimum=0)
    columns = math.ceil(math.sqrt(count)) if columns is None else require_positive_int("columns", columns)
    rows = -(-count // columns)
    below = 0 if captions is None else max(text.height for text in _texts(captions, width)) + padding
    return rows * (height + padding) + padding + below, columns * (width + padding) + padding, columns


def require_picture(name: str, path: Path, height: int = 1, width: int = 1) -> tuple[str, dict[str, object]]:
    """How a picture of this size is written to ``path``: Pillow's format and its options.

    Raises:
        ArgumentError: an ending that is not written, or a format that does not hold so many pixels.
    """
    known = PICTURES.get(path.suffix.lower())
    if known is None:
        raise ArgumentError(f"{name}: expected a name that ends in {', '.join(PICTURES)}, got {path}")
    if max(height, width) > _LARGEST[known[0]]:
        raise ArgumentError(
            f"{name}: {known[0]} holds {_LARGEST[known[0]]} pixels a side, this picture has {height} x {width}; "
            "choose a name that ends in .png"
        )
    return known


def is_picture(name: str, path: Path) -> bool:
    """Whether images become one picture or a folder.

    Raises:
        ArgumentError: the name ends like a file's of a type that is not written.
    """
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return True
    if not path.is_dir() and (suffix[1:].isalpha() or suffix in picture_types()):
        raise ArgumentError(
            f"{name}: expected a picture's name that ends in {', '.join(PICTURES)}, or a folder's without an ending, "
            f"got {path}"
        )
    return False


def require_free(path: Path, overwrite: bool) -> None:
    """
    Raises:
        FileConflictError: what is at ``path`` is not to be replaced.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileConflictError(f"path: {path} exists already; nothing was written")


def image_grid(
    images: Tensor, columns: int | None = None, padding: int = 2, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Images side by side, row by row, on white.

    Args:
        images: float [N, C, H, W] in [-1, 1] (values outside are clipped), C = 1 or 3.
        columns: images per row; by default as square as it gets.
        padding: white pixels between images and around them.
        captions: names under the columns, one for each; turned upright where one is wider than a column.

    Returns:
        uint8 [rows * (H + padding) + padding, columns * (W + padding) + padding, 3], or without the last axis if C = 1;
        with captions as much higher as they need.

    Raises:
        ArgumentError, ArgumentTypeError: no images, or numbers or captions that do not fit.
    """
    require_floating("images", require_tensor("images", images))
    require_shape("images", images, ("N", "C", "H", "W"))
    count, channels, height, width = images.shape
    if count == 0 or channels not in (1, 3):
        raise ArgumentError(f"images: expected at least one image of 1 or 3 channels, got shape {list(images.shape)}")
    *canvas_size, columns = grid_size(count, height, width, columns, padding, captions)
    if captions is not None and len(captions) != columns:
        raise ArgumentError(f"captions: expected {columns}, one per column, got {len(captions)}")
    pixels = images.detach().float().nan_to_num(0.0).clamp(-1, 1).add(1).mul(127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).cpu()  # [N, H, W, C]
    canvas = np.full((*canvas_size, channels), 255, np.uint8)
    for index, image in enumerate(pixels.numpy()):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image
    top = -(-count // columns) * (height + padding) + padding
    for index, text in enumerate([] if captions is None else _texts(captions, width)):
        letters = np.asarray(text)[:, :width, None]
        left = padding + index * (width + padding) + (width - letters.shape[1]) // 2
        canvas[top : top + len(letters), left : left + letters.shape[1]] = letters
    return canvas[..., 0] if channels == 1 else canvas


def _texts(captions: Sequence[str], width: int) -> list[Image.Image]:
    """Captions in black on white, mode L; all upright if one of them is wider than ``width`` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_LETTERS)
    texts = []
    for caption in captions:
        left, _, right, _ = font.getbbox(caption)
        texts.append(Image.new("L", (max(1, math.ceil(right - left)), _LETTERS + 3), 255))
        ImageDraw.Draw(texts[-1]).text((-left, 0), caption, fill=0, font=font)
    if max(text.width for text in texts) <= width:
        return texts
    return [text.transpose(Image.Transpose.ROTATE_90) for text in texts]


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    columns: int | None = None,
    *,
    padding: int = 2,
    captions: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write :func:`image_grid` as PNG, JPEG or (lossless) WebP, as the name ends, whole or not; returns the path.

    Args:
        path: ends in .png, .jpg, .jpeg or .webp.
        images, columns, padding, captions: as of :func:`image_grid`.
        overwrite: replace a file that is there.

    Raises:
        FileConflictError: the file exists and ``overwrite`` is False.
        ArgumentError: the name ends in something else, or the images do not fit.
        DiskFullError: there is no room; the file is as it was.
    """
    path = Path(path)
    require_picture("path", path)
    require_free(path, overwrite)
    written = picture_bytes(path, image_grid(images, columns, padding, captions))
    with replacing_file(path) as temporary:
        temporary.write_bytes(written)
    return path


def picture_bytes(path: Path, pixels: np.ndarray) -> bytes:
    """What the file of a picture holds, as its name ends; pixels are those of :func:`image_grid`.

    Raises:
        ArgumentError: the name ends in something else, or the format does not hold so many pixels.
    """
    from PIL import Image

    picture = Image.fromarray(pixels)
    kind, options = require_picture("path", path, picture.height, picture.width)
    # Through memory: Pillow writes JPEG past Python's file, and takes no notice when a full disk cuts it short.
    written = io.BytesIO()
    picture.save(written, format=kind, **options)
    return written.getvalue()
