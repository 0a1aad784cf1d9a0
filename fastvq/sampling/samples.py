"""What a pipeline draws: images beside their codes, as pictures and as files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastvq._files import replacing_folder, save_tensors, write_json
from fastvq._version import __version__
from fastvq.data.grid import image_grid, is_picture, picture_bytes, save_grid
from fastvq.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image

CODES_FILE, SETTINGS_FILE = "codes.safetensors", "samples.json"


@dataclass(frozen=True, eq=False)
class Samples:
    """Result of :meth:`Pipeline.sample` and :meth:`Pipeline.inpaint`.

    Attributes:
        images: float32 [n, C, H, W], clamped to [-1, 1]; up to the decoder's rounding, which may depend on how many
            images are decoded together.
        codes: int64 [n, h, w] for each level, top first; -1 where a callback ended sampling before.
        seed, micro_batch: what to pass to get the same codes again; ``micro_batch`` matters where engines round
            differently for other sizes.
        labels: int64 [n], or None without classes.
        class_names: a name per label, or None.
        logprobs: float32 [n, h, w] for each level where they were asked for, see :func:`fastvq.sample`; else None.
    """

    images: Tensor
    codes: tuple[Tensor, ...]
    seed: int
    micro_batch: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    logprobs: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        grids = ", ".join(f"{level.shape[1]} x {level.shape[2]}" for level in self.codes)
        size = " x ".join(map(str, self.images.shape[1:]))
        return f"Samples({len(self)} images {size}, codes {grids}, seed {self.seed}, on {self.images.device})"

    def _repr_png_(self) -> bytes | None:
        """All in one picture, as notebooks show it."""
        return picture_bytes(Path("samples.png"), image_grid(self.images)) if self._is_picture() else None

    def _is_picture(self) -> bool:
        return len(self) > 0 and self.images.shape[1] in (1, 3)

    def pil(self) -> list[Image.Image]:
        """Each image as one of Pillow, of mode L or RGB.

        Raises:
            ArgumentError: images of other than 1 or 3 channels.
        """
        from PIL import Image

        return [Image.fromarray(image_grid(image[None], padding=0)) for image in self.images]

    def save(self, path: str | os.PathLike[str], *, columns: int | None = None, overwrite: bool = False) -> Path:
        """Write one picture of all images, or a folder of them; returns its path.

        Args:
            path: a name that ends in .png, .jpg, .jpeg or .webp, for one picture; one without an ending is a folder, in
                which image i becomes ``00000i.png``, beside ``codes.safetensors`` (``level0``, ``level1``, ..., top
                first) and ``samples.json`` with what there is to know of them.
            columns: of the picture; by default as square as it gets.
            overwrite: replace the file, or a folder of earlier samples.

        Raises:
            FileConflictError: something is there already; it stays as it is.
            ArgumentError: the images make no picture, or the name ends in something else.
            DiskFullError: there is no room; what was there is as it was.
        """
        path = Path(path)
        if not self._is_picture():
            raise ArgumentError(f"images: expected at least one of 1 or 3 channels, got {list(self.images.shape)}")
        if is_picture("path", path):
            return save_grid(path, self.images, columns, overwrite=overwrite)
        if columns is not None:
            raise ArgumentError(f"columns: {path} becomes a folder, only one picture has them")
        return write_samples(path, self, {}, overwrite=overwrite)


def write_samples(folder: Path, samples: Samples, settings: Mapping[str, Any], *, overwrite: bool) -> Path:
    """A folder of images, codes and ``samples.json``, in which ``settings`` are told as well."""
    description = {
        "n": len(samples),
        "labels": None if samples.labels is None else samples.labels.tolist(),
        "class_names": samples.class_names,
        "seed": samples.seed,
        "micro_batch": samples.micro_batch,
        **settings,
        "fastvq_version": __version__,
    }
    with replacing_folder(folder, overwrite=overwrite) as temporary:
        for index, image in enumerate(samples.images):
            save_grid(temporary / f"{index:06d}.png", image[None], padding=0)
        codes = {f"level{level}": grid.cpu().contiguous() for level, grid in enumerate(samples.codes)}
        save_tensors(codes, temporary / CODES_FILE)
        write_json(temporary / SETTINGS_FILE, description)
    return folder
