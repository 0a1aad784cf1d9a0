"""A folder of image files as a data set."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastvq._check import require_choice, require_positive_int
from fastvq.data.base import require_size
from fastvq.errors import ArgumentError, CorruptFileError, MissingFileError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
_LISTED = 20
_THREADS = 8


class ImageFolder:
    """All images below a folder, resized and cropped to one size.

    The folder is searched recursively for jpg, jpeg, png and webp files, in sorted order; names that begin with a dot
    are passed over. If every image lies in a sub-folder, the first-level sub-folders' names are the class names. Each
    image is turned upright (EXIF), cropped at the centre to the aspect of ``size`` and resized (bicubic, antialiased).
    Transparent pixels become white, 16-bit images are scaled to 8 bits.

    Args:
        root: the folder.
        size: an int for a square, or (H, W).
        channels: 3 (RGB) or 1 (grey).
        skip_broken: go on without images that cannot be read; they are listed in ``skipped`` and in one warning.
        max_pixels: largest width * height of a file. Pillow's own limit holds besides.
        check: ``decode`` reads every image once now, ``header`` only its size and format, so that damage further into
            a file is found when the image is used.
        cache: keep all images decoded in memory (C * H * W bytes each); needs ``check="decode"``.
        progress: show a progress bar on stderr during the check.

    Attributes:
        paths: the images' files. labels, class_names, channels, size: see :class:`ImageDataset`.
        skipped: (path, reason) of the images left out.

    Raises:
        MissingFileError: ``root`` is not a folder, or holds no image.
        CorruptFileError: some images cannot be read and ``skip_broken`` is False, or none can.
    """

    labels: Tensor | None

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        skip_broken: bool = False,
        max_pixels: int = MAX_PIXELS,
        check: Literal["decode", "header"] = "decode",
        cache: bool = False,
        progress: bool = False,
    ) -> None:
        self.size = require_size("size", size)
        if channels not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {channels!r}")
        self.channels = channels
        self._max_pixels = require_positive_int("max_pixels", max_pixels)
        require_choice("check", check, ("decode", "header"))
        if cache and check != "decode":
            raise ArgumentError('cache: needs check="decode", which is what fills the cache')
        self.root = Path(root)
        if not self.root.exists():
            raise MissingFileError(f"root: {self.root} does not exist")
        if not self.root.is_dir():
            raise MissingFileError(f"root: {self.root} is a file, expected a folder of images")
        found = sorted(_image_files(self.root, ()), key=lambda path: path.relative_to(self.root).as_posix())
        if not found:
            raise MissingFileError(f"root: no {', '.join(SUFFIXES)} file in {self.root} or its sub-folders")

        self._cache = np.empty((len(found), *self.size, channels), dtype=np.uint8) if cache else None
        reasons = self._check_all(found, check, progress)
        bad = [(path, reason) for path, reason in zip(found, reasons, strict=True) if reason is not None]
        good = [index for index, reason in enumerate(reasons) if reason is None]
        if bad and (not skip_broken or not good):
            outcome = "nothing else is left" if skip_broken else "skip_broken=True goes on without them"
            raise CorruptFileError(_report(bad, len(found), outcome))
        if bad:
            warnings.warn(_report(bad, len(found), "going on without them"), stacklevel=2)
        self.skipped = bad
        self.paths = [found[index] for index in good]
        if self._cache is not None and bad:
            self._cache = self._cache[good]
        self.class_names, self.labels = self._classes(found)

    def _check_all(self, paths: list[Path], check: str, progress: bool) -> list[str | None]:
        from tqdm import tqdm

        def reason(job: tuple[int, Path]) -> str | None:
            index, path = job
            try:
                pixels = self._read(path, decode=check == "decode")
            except CorruptFileError as error:
                return str(error).removeprefix(f"{path}: ")
            if self._cache is not None:
                self._cache[index] = pixels
            return None

        with ThreadPoolExecutor(_THREADS) as pool:
            reasons = pool.map(reason, enumerate(paths))
            return list(tqdm(reasons, "checking images", len(paths), disable=not progress, file=sys.stderr))

    def _classes(self, found: list[Path]) -> tuple[tuple[str, ...], Tensor | None]:
        """Class names come from all files found, so that they do not depend on which ones are broken."""
        parts = [path.relative_to(self.root).parts for path in found]
        loose = sum(len(p) == 1 for p in parts)
        if loose:
            if loose < len(parts):
                warnings.warn(
                    f"{loose} of {len(parts)} images lie directly in {self.root}, so there are no labels",
                    stacklevel=3,
                )
            return (), None
        names = sorted({p[0] for p in parts})
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[path.relative_to(self.root).parts[0]] for path in self.paths]
        return tuple(names), torch.tensor(labels, dtype=torch.int64)

    @property
    def num_classes(self) -> int | None:
        """Number of sub-folders that serve as labels, or None."""
        return None if self.labels is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """float32 [C, H, W] in [-1, 1].

        Raises:
            CorruptFileError: the file cannot be read (any more).
        """
        pixels = self._read(self.paths[index]) if self._cache is None else self._cache[index]
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()

    def fingerprint(self) -> str:
        """Hash of the relative paths, the files' sizes in bytes and the settings (not of the pixels: that is slow)."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(
                f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\0".encode(errors="surrogateescape")
            )
        return f"folder-{self.channels}x{self.size[0]}x{self.size[1]}-{len(self)}-{digest.hexdigest()}"

    def _read(self, path: Path, *, decode: bool = True) -> np.ndarray:
        """uint8 [H, W, C]; without ``decode`` only the header is read and the result is empty."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("not a regular file")
            with Image.open(path, formats=FORMATS) as image:
                pixels = image.width * image.height
                # Pillow only warns at its limit and raises at twice that; here the limit is the limit.
                limit = min(self._max_pixels, Image.MAX_IMAGE_PIXELS or self._max_pixels)
                if pixels > limit:
                    raise ValueError(f"{image.width} x {image.height} = {pixels} pixels, more than the limit {limit}")
                return self._convert(image) if decode else np.empty(0, np.uint8)
        # Damaged files make Pillow's decoders raise nearly anything, from OSError to IndexError.
        except Exception as error:
            raise CorruptFileError(f"{path}: {_reason(error)}") from error

    def _convert(self, image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow opens as I;16 or, in older versions, as I
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        height, width = self.size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.array(image).reshape(height, width, self.channels)


def _image_files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Candidate files below a folder. ``above`` identifies the folders on the way here, so that links form no loop."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise MissingFileError(f"root: cannot read the folder {folder} ({error.strerror})") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _image_files(Path(entry.path), (*above, here))
        elif entry.name.lower().endswith(SUFFIXES):
            yield Path(entry.path)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _report(bad: list[tuple[Path, str]], total: int, outcome: str) -> str:
    lines = [f"  {path}: {reason}" for path, reason in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    return "\n".join([f"{len(bad)} of {total} images cannot be read; {outcome}:", *lines])
