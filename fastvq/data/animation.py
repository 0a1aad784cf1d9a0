"""Grids of images that change, as one animated picture."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from fastvq._files import replacing_file
from fastvq.data.grid import image_grid, require_free
from fastvq.errors import ArgumentError

# How animated pictures are written, by the ending of their name: Pillow's format and its options.
ANIMATIONS: dict[str, tuple[str, dict[str, object]]] = {
    ".gif": ("GIF", {}),
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
}
# Pixels of a frame. All frames are in memory until they are written.
_LARGEST = 2**22


def require_animation(name: str, path: Path, height: int = 1, width: int = 1) -> tuple[str, dict[str, object]]:
    """How an animated picture of this size is written to ``path``: Pillow's format and its options.

    Raises:
        ArgumentError: an ending that is not written, or too many pixels.
    """
    known = ANIMATIONS.get(path.suffix.lower())
    if known is None:
        raise ArgumentError(f"{name}: expected a name that ends in {', '.join(ANIMATIONS)}, got {path}")
    if height * width > _LARGEST:
        raise ArgumentError(
            f"{name}: an animated picture may have {_LARGEST} pixels, this one has {height} x {width}; show fewer "
            "images"
        )
    return known


def save_animation(
    path: str | os.PathLike[str],
    frames: Iterable[Tensor],
    columns: int | None = None,
    *,
    padding: int = 2,
    captions: Sequence[str] | None = None,
    seconds: float = 4.0,
    overwrite: bool = False,
) -> Path:
    """Write grids of images, one after the other in a loop, as GIF, PNG (APNG) or lossless WebP, whole or not.

    Args:
        path: ends in .gif (256 colours a frame), .png or .webp.
        frames: images of each frame, float [N, C, H, W], as :func:`image_grid` takes them.
        columns, padding, captions: as of :func:`image_grid`.
        seconds: how long all frames take; the last one stays for two more.
        overwrite: replace a file that is there.

    Raises:
        FileConflictError: the file exists and ``overwrite`` is False.
        ArgumentError: the name ends in something else, or the images do not fit.
        DiskFullError: there is no room; the file is as it was.
    """
    from PIL import Image

    path = Path(path)
    require_animation("path", path)
    require_free(path, overwrite)
    pictures = []
    for frame in frames:
        pixels = image_grid(frame, columns, padding, captions)
        kind, options = require_animation("path", path, *pixels.shape[:2])
        pictures.append(Image.fromarray(pixels))
    if not pictures:
        raise ArgumentError("frames: expected at least one frame, got none")
    # GIF counts hundredths of a second, and programs take less than two of them for ten.
    each = max(20, round(seconds * 100 / len(pictures)) * 10)
    durations = [*[each] * (len(pictures) - 1), each + 2000]
    written = io.BytesIO()
    pictures[0].save(
        written, format=kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    with replacing_file(path) as temporary:
        temporary.write_bytes(written.getvalue())
    return path
