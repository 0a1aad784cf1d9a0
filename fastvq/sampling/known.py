"""What is known of samples before they are drawn: codes of upper levels, or a picture outside of a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_floating, require_integer, require_mask, require_range, require_shape, require_tensor
from fastvq.errors import ArgumentError
from fastvq.models.prior import Prior


@dataclass(frozen=True)
class Known:
    """Codes of a level.

    Attributes:
        codes: int64 [n, h, w].
        where: bool [n, h, w], True where a code is kept; None: all of them are, and nothing is drawn.
    """

    codes: Tensor
    where: Tensor | None = None


def check_upper_codes(priors: Sequence[Prior], codes: Sequence[Tensor], n: int) -> tuple[Known, ...]:
    """Codes of the first levels, int [n or 1, h, w] each, for n samples.

    Raises:
        ArgumentError, ArgumentTypeError: they do not fit the priors, or leave no level to draw.
    """
    if isinstance(codes, Tensor) or len(codes) >= len(priors):
        count = "a single tensor" if isinstance(codes, Tensor) else f"{len(codes)} levels"
        raise ArgumentError(
            f"codes: expected a sequence of at most {len(priors) - 1} of {len(priors)} levels, top first, got {count}"
        )
    known = []
    for level, given in enumerate(codes):
        name, config = f"codes[{level}]", priors[level].config
        # Values are checked on the CPU, where reading them does not wait for a GPU.
        grids = require_integer(name, given).cpu()
        if tuple(grids.shape) != (1, *config.shape):
            require_shape(name, grids, [n, *config.shape])
        require_range(name, grids, config.num_codes)
        known.append(Known(grids.expand(n, -1, -1)))
    return tuple(known)


def check_pictures(images: Tensor, mask: Tensor, n: int | None, shape: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Images of ``shape`` (C, H, W), masks bool [B or 1, H, W] of what to paint in them, and how many to draw.

    Raises:
        ArgumentError, ArgumentTypeError: they do not fit each other or the model, or there is nothing to paint.
    """
    require_floating("images", require_tensor("images", images))
    require_shape("images", images, ["B", *shape])
    count = len(images)
    flat = require_tensor("mask", mask).ndim == 2
    mask = require_mask("mask", mask, shape[1:] if flat else ["B", *shape[1:]], "where the image is painted anew")
    mask = mask.cpu()[None] if flat else mask.cpu()
    n = count if n is None else n
    if count not in (1, n):
        raise ArgumentError(f"images: expected 1, or one for each of the {n} samples, got {count}")
    if len(mask) not in (1, n):
        raise ArgumentError(f"mask: expected [H, W], or one for each of the {n} samples, got {len(mask)}")
    images = images.float()
    outside = ~((images >= -1) & (images <= 1))
    if bool(outside.any()):
        raise ArgumentError(f"images: values must lie in [-1, 1], got {float(images[outside][0])}")
    if not bool(mask.flatten(1).any(1).all()):
        raise ArgumentError("mask: nothing is to be painted, no pixel is True")
    return images, mask, n


def without_region(images: Tensor, region: Tensor) -> Tensor:
    """Images [B, C, H, W] with a smooth continuation of the other pixels where ``region`` (bool [B or 1, 1, H, W]) is.

    Encoders look further than a cell, so what lies in the region marks the codes around it; a smooth continuation marks
    them less than one colour does. It approaches the harmonic one, in which each pixel is the mean of those around it.
    """
    kept = (~region).sum((2, 3), keepdim=True)
    mean = images.masked_fill(region, 0).sum((2, 3), keepdim=True) / kept.clamp(min=1)
    filled = torch.where(region, mean, images)
    for _ in range(4 * max(images.shape[2:])):
        around = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        filled = torch.where(region, around, images)
    return filled


def known_cells(mask: Tensor, shape: tuple[int, int], margin: int) -> Tensor:
    """Codes of a level of ``shape`` that are kept, bool [B, h, w]: those whose cell of pixels lies outside the mask.

    Args:
        mask: bool [B, H, W], True where the image is painted anew.
        margin: cells around the mask that are not kept either.
    """
    cell = (mask.shape[1] // shape[0], mask.shape[2] // shape[1])
    painted = F.max_pool2d(mask.float(), cell)
    if margin:
        painted = F.max_pool2d(painted, 2 * margin + 1, stride=1, padding=margin)
    return painted == 0
