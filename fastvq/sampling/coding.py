"""Images to codes and back, a few at a time, and what grids of codes look like while they are filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvq._check import require_floating, require_positive_int, require_shape, require_tensor
from fastvq._evaluation import in_evaluation
from fastvq.errors import ArgumentError
from fastvq.sampling.autoencoder import AnyAutoencoder, OwnAutoencoder, weight_of
from fastvq.sampling.request import micro_batches

# Images that go through the autoencoder together, whose features take more memory than the sampler's.
DECODED = 8


@torch.no_grad()
def encode(vqvae: AnyAutoencoder, images: Tensor) -> tuple[Tensor, ...]:
    """Codes of images [n, C, H, W] in [-1, 1]: int64 [n, h, w] for each level, top first, on the model's device."""
    require_floating("images", require_tensor("images", images))
    weight, vqvae = weight_of(vqvae), in_evaluation(vqvae)
    # Whether the shape is right, the model says.
    count = len(images) if images.ndim else 0
    parts = [images[part] for part in micro_batches(count, DECODED)] or [images]
    codes = [vqvae.encode(part.to(weight.device, weight.dtype)) for part in parts]
    return tuple(torch.cat(level) for level in zip(*codes, strict=True))


@torch.no_grad()
def decode(vqvae: AnyAutoencoder, codes: Tensor | Sequence[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
    """Images of codes, int64 [n, h, w] of each level, top first: float32 [n, C, H, W], clamped to [-1, 1].

    Args:
        codes: a tensor of each level; of a single level also the tensor alone.
        known: where codes are known, as of :meth:`HierarchicalVQVAE.preview`; by default everywhere.
    """
    codes = _levels_of(vqvae, codes)
    n, vqvae = len(codes[0]), in_evaluation(vqvae)
    size = (n, *image_shape_of(vqvae, codes[0].shape[1:]))
    images = torch.empty(size, dtype=torch.float32, device=codes[0].device)
    for part in micro_batches(n, DECODED):
        grids = [level[part] for level in codes]
        found = vqvae.decode(grids) if known is None else vqvae.preview(grids, [level[part] for level in known])
        images[part] = found.float().clamp(-1, 1)
    return images


def _levels_of(vqvae: AnyAutoencoder, codes: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Codes [n, h, w] of each level, as many of each."""
    levels = [codes] if isinstance(codes, Tensor) and vqvae.num_levels == 1 else codes
    if isinstance(levels, Tensor) or len(levels) != vqvae.num_levels:
        given = f"a tensor of shape {list(levels.shape)}" if isinstance(levels, Tensor) else f"{len(levels)} of them"
        raise ArgumentError(f"codes: expected a sequence of {vqvae.num_levels} tensors, one per level, got {given}")
    for level, grid in enumerate(levels):
        rows = "n" if level == 0 else len(levels[0])
        require_shape(f"codes[{level}]", require_tensor(f"codes[{level}]", grid), [rows, "h", "w"])
    return list(levels)


def image_shape_of(vqvae: AnyAutoencoder, top: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of the images of a grid of the top level."""
    if isinstance(vqvae, OwnAutoencoder):
        return vqvae.image_shape
    return vqvae.config.in_channels, top[0] * vqvae.total_stride, top[1] * vqvae.total_stride


def reconstruct(vqvae: AnyAutoencoder, images: Tensor) -> Tensor:
    """What codes keep of images [n, C, H, W] in [-1, 1]: float32 [n, C, H, W], clamped, on the model's device."""
    return decode(vqvae, encode(vqvae, images))


def frames(
    vqvae: AnyAutoencoder, codes: Tensor | Sequence[Tensor], *, known: Sequence[Tensor] | None = None, most: int = 60
) -> Iterator[Tensor]:
    """Images of grids being filled in the order of sampling: top level first, each in raster order.

    A code that has been drawn stays. So these are found from the finished codes: in each frame those drawn so far are
    decoded, with the mean vector of their level in place of the others. Costs as much as decoding all images as many
    times as there are frames.

    Args:
        vqvae: whose codes they are.
        codes: int64 [n, h, w] of all levels, top first; of a single level also the tensor alone.
        known: bool [n, h, w] of all levels, True where a code was there before anything was drawn.
        most: frames after the first; where positions are more, each frame adds whole rows.

    Yields:
        float32 [n, C, H, W], clamped to [-1, 1]: first with nothing drawn, last with everything.
    """
    codes = _levels_of(vqvae, codes)
    most = require_positive_int("most", most, minimum=len(codes))
    there = [torch.zeros_like(level, dtype=torch.bool) for level in codes] if known is None else [*known]
    shapes = [tuple(level.shape[1:]) for level, mask in zip(codes, there, strict=True) if not bool(mask.all())]
    # Positions that a frame adds in each of the levels that are drawn.
    steps = [1] * len(shapes)
    rows = 0
    while sum(-(-h * w // step) for (h, w), step in zip(shapes, steps, strict=True)) > most:
        rows += 1
        steps = [min(rows, h) * w for h, w in shapes]
    yield decode(vqvae, codes, there)
    drawn = iter(steps)
    for level, grid in enumerate(codes):
        if bool(there[level].all()):
            continue
        positions = torch.arange(grid[0].numel(), device=grid.device).view_as(grid[0])
        step = next(drawn)
        for count in range(step, positions.numel() + step, step):
            now = there[level] | (positions < count)
            yield decode(vqvae, codes, [*there[:level], now, *there[level + 1 :]])
        there[level] = torch.ones_like(there[level])
