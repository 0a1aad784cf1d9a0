"""Autoencoders of other projects in a pipeline: what they have to do, and checks that they do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastvq._check import INTEGER_DTYPES, require_integer, require_positive_int, require_shape
from fastvq._evaluation import in_evaluation
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.vqvae import HierarchicalVQVAE


@runtime_checkable
class Autoencoder(Protocol):
    """What :class:`fastvq.Pipeline` asks of an autoencoder that is none of :mod:`fastvq.models`.

    Both are called in evaluation mode (if it is a module), without gradients, with tensors on its device.
    """

    def encode(self, images: Tensor, /) -> Tensor | Sequence[Tensor]:
        """Codes of images, floating point [B, C, H, W] in [-1, 1].

        Returns:
            Integers [B, h, w] of each level in a sequence, the coarsest level first; of a single level also the tensor
            alone.
        """
        ...

    def decode(self, codes: Any, /) -> Tensor:
        """Images of codes.

        Args:
            codes: int64 [B, h, w]: a tuple with those of each level, or the tensor alone if that is what :meth:`encode`
                gives.

        Returns:
            Floating point [B, C, H, W] in about [-1, 1].
        """
        ...


class OwnAutoencoder(nn.Module):
    """An autoencoder of another class, in the form of ours.

    Args:
        model: it, see :class:`Autoencoder`.
        image_shape: (C, H, W) of its images.
        shapes, num_codes: grids and codebook sizes of the priors of its levels, top first.

    Attributes:
        model: what was given.

    Raises:
        ArgumentError, ArgumentTypeError: one image was encoded and decoded, and what came does not fit the priors.
    """

    def __init__(
        self,
        model: Any,
        image_shape: tuple[int, int, int],
        shapes: Sequence[tuple[int, int]],
        num_codes: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model = model
        self.image_shape, self.shapes, self.num_codes = image_shape, tuple(shapes), tuple(num_codes)
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        # Of a model without parameters the place is that of the priors.
        self.register_buffer("_place", torch.empty(0, device=device) if first is None else None, persistent=False)
        self.alone = False
        self._try()

    def _try(self) -> None:
        place, tried = weight_of(self), in_evaluation(self)
        image = torch.zeros(1, *self.image_shape, dtype=place.dtype, device=place.device)
        with torch.no_grad():
            self.alone = tried.alone = isinstance(tried.model.encode(image), Tensor)
            tried.decode(tried.encode(image))

    @property
    def num_levels(self) -> int:
        return len(self.shapes)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Codes of images [B, C, H, W] of the shape given: int64 [B, h, w] of each level, top first."""
        require_shape("images", images, ["B", *self.image_shape])
        found = self.model.encode(images)
        levels = [found] if isinstance(found, Tensor) else found
        if not isinstance(levels, (list, tuple)) or len(levels) != self.num_levels:
            expected = f"a sequence of {self.num_levels} levels of codes, top first"
            raise ArgumentError(f"vqvae.encode: expected {expected}, one per prior, got {_told(found)}")
        return tuple(self._level(level, grid, len(images)) for level, grid in enumerate(levels))

    def _level(self, level: int, grid: object, batch: int) -> Tensor:
        name, wanted = f"vqvae.encode: codes of level {level}", [batch, *self.shapes[level]]
        if not isinstance(grid, Tensor) or grid.dtype not in INTEGER_DTYPES:
            raise ArgumentTypeError(f"{name}: expected integers of shape {wanted}, got {_told(grid)}")
        if list(grid.shape) != wanted:
            raise ArgumentError(f"{name}: expected shape {wanted}, as priors[{level}] has it, got {list(grid.shape)}")
        codes = require_integer(name, grid)
        low, high = (int(value) for value in codes.aminmax()) if codes.numel() else (0, 0)
        if low < 0 or high >= self.num_codes[level]:
            bad = low if low < 0 else high
            raise ArgumentError(
                f"{name}: expected codes in 0..{self.num_codes[level] - 1}, as priors[{level}] has them, got {bad}"
            )
        return codes

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images [B, C, H, W] of codes int64 [B, h, w] of each level, top first."""
        images = self.model.decode(codes[0] if self.alone else tuple(codes))
        wanted = [len(codes[0]), *self.image_shape]
        if not isinstance(images, Tensor) or not images.is_floating_point():
            expected = f"images, floating point of shape {wanted}"
            raise ArgumentTypeError(f"vqvae.decode: expected {expected}, got {_told(images)}")
        if list(images.shape) != wanted:
            raise ArgumentError(f"vqvae.decode: expected images of shape {wanted}, got {list(images.shape)}")
        return images

    def preview(self, codes: Sequence[Tensor], known: Sequence[Tensor] | None = None) -> Tensor:
        """:meth:`decode` with code 0 in place of each that is missing: what stands for nothing is not known here."""
        missing = [torch.zeros_like(codes[0][:, :1, :1]).expand(-1, *shape) for shape in self.shapes[len(codes) :]]
        given = codes if known is None else [torch.where(*pair, 0) for pair in zip(known, codes, strict=True)]
        return self.decode([*given, *missing])


def own_autoencoder(
    model: Any,
    image_shape: Sequence[int] | None,
    shapes: Sequence[tuple[int, int]],
    num_codes: Sequence[int],
    device: torch.device,
) -> OwnAutoencoder:
    """
    Args:
        image_shape: (C, H, W); by default the model's attribute of this name.

    Raises:
        ArgumentError, ArgumentTypeError: what is needed is missing, or does not fit; see :class:`OwnAutoencoder`.
    """
    kind = type(model).__name__
    lacking = [name for name in ("encode", "decode") if not callable(getattr(model, name, None))]
    if lacking:
        raise ArgumentTypeError(
            f"vqvae: expected a VQVAE, a VQVAE2, or an object with encode and decode, got {kind} without "
            f"{' and '.join(lacking)}"
        )
    given = getattr(model, "image_shape", None) if image_shape is None else image_shape
    if given is None:
        raise ArgumentError(f"image_shape: expected (C, H, W) of the images that {kind} takes, got None")
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise ArgumentError(f"image_shape: expected (C, H, W), got {given!r}")
    for side in given:
        require_positive_int("image_shape", side)
    channels, height, width = given
    return OwnAutoencoder(model, (channels, height, width), shapes, num_codes, device)


AnyAutoencoder = HierarchicalVQVAE | OwnAutoencoder


def weight_of(vqvae: AnyAutoencoder) -> Tensor:
    """A tensor of the type and on the device that images have to have."""
    floating = (tensor for tensor in vqvae.parameters() if tensor.is_floating_point())
    found = next(floating, None)
    return next(vqvae.buffers()) if found is None else found


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(_told, value))}"
    return type(value).__name__
