"""Quantisers without a codebook, which quantise every channel on its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvq._check import require_bool, require_positive_int
from fastvq.errors import ArgumentError
from fastvq.models.limits import LARGEST
from fastvq.models.quantizer.assignment import require_code_grid, require_vectors
from fastvq.models.quantizer.projected import Projected
from fastvq.models.quantizer.vector import QuantizerOutput, perplexity


class ScalarQuantizer(Projected):
    """Each of D channels takes one of its levels, and a code is the number whose digits these are.

    There are no weights but those of projections, nothing moves, and no distance to a code is computed. ``perplexity``
    and ``dead_codes`` are of this process; each pass makes one count per code for them.

    Args:
        levels: how many each channel has.
        places: what a channel's digit counts for in the code.
        heads: into how many vectors of D channels each input vector is split, each with a code.
        input_dim: channels of the input, mapped linearly to and from heads * D; None: it has heads * D.
        channels_last: whether vectors lie along the last axis ([..., C]) rather than axis 1 ([B, C, ...]).
    """

    _levels: Tensor
    _places: Tensor

    def __init__(
        self, levels: Sequence[int], places: Sequence[int], *, heads: int, input_dim: int | None, channels_last: bool
    ) -> None:
        super().__init__()
        self.heads = require_positive_int("heads", heads)
        require_bool("channels_last", channels_last)
        self.channels_last = channels_last
        self.code_dim, self.num_codes = len(levels), 1
        for count in levels:
            self.num_codes *= count
        if self.num_codes > LARGEST:
            raise ArgumentError(f"{type(self).__name__}: expected at most {LARGEST} codes, got {self.num_codes}")
        # Integers, which a conversion of the module to another type leaves alone.
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_places", torch.tensor(places), persistent=False)
        self._make_projections(input_dim, heads * self.code_dim)

    @abstractmethod
    def _quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of vectors [N, heads, D] the quantised ones, with a gradient to them, and their digits as int64."""

    @abstractmethod
    def _values(self, digits: Tensor) -> Tensor:
        """float32 [..., D] of digits."""

    def _losses(self, vectors: Tensor, quantized: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Commitment and codebook loss of vectors [N, heads, D] where ``real`` [N]."""
        zero = vectors.new_zeros(())
        return zero, zero.clone()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantise vectors [B, C, ...] (or [..., C] when ``channels_last``).

        Args:
            x: of any floating-point type.
            mask: bool, the shape of x without the vector axis; where it is False there is no vector (padding):
                ``quantized`` is 0, codes are -1, and nothing else takes account of it.
        """
        narrow = self._arranged(x, mask)
        real = None if mask is None else mask.flatten()
        # Steps of half a level would be lost in a shorter type.
        with torch.autocast(x.device.type, enabled=False):
            vectors = self._vectors(narrow, real)
            quantized, digits = self._quantize(vectors)
            codes = self._codes(digits)
            used = self._counts(codes, real)
            commitment_loss, codebook_loss = self._losses(vectors, quantized, real)
            quantized = quantized.to(narrow.dtype)
            if real is not None:
                quantized = torch.where(real[:, None, None], quantized, 0)
                codes = torch.where(real[:, None], codes, -1)
        wide = self._widened(quantized.view(narrow.shape), mask).to(x.dtype)
        return QuantizerOutput(
            wide if self.channels_last else wide.movedim(-1, 1),
            self._grid(codes, narrow.shape),
            commitment_loss,
            perplexity(used.float()),
            codebook_loss,
            (used == 0).sum(),
        )

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The codes alone.

        Args:
            x, mask: as of :meth:`forward`.

        Returns:
            int64, as ``codes`` of :class:`fastvq.models.QuantizerOutput`.
        """
        narrow = self._arranged(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            codes = self._codes(self._quantize(self._vectors(narrow, None))[1])
        grid = self._grid(codes, narrow.shape)
        if mask is None:
            return grid
        return torch.where(mask if self.heads == 1 else mask[..., None], grid, -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of codes.

        Args:
            codes: integers [B, ...], with several heads [B, ..., heads]. Code -1, which stands for a masked position,
                gives zeros.

        Returns:
            [B, C, ...], or [..., C] when ``channels_last``.

        Raises:
            ArgumentError, ArgumentTypeError: codes of another shape, type or (on the CPU) range.
        """
        codes, absent = require_code_grid(codes, self.heads, self.num_codes)
        digits = codes[..., None].div(self._places, rounding_mode="floor") % self._levels
        return self._looked_up(self._values(digits), absent, heads=self.heads, channels_last=self.channels_last)

    def _arranged(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Checked input as [..., heads * D]."""
        axis = -1 if self.channels_last else 1
        require_vectors(x, mask, self._channels(self.heads * self.code_dim), axis)
        return self._narrowed(x.movedim(axis, -1), mask)

    def _vectors(self, narrow: Tensor, real: Tensor | None) -> Tensor:
        """[N, heads, D] in float32 at least, 0 where there is no vector."""
        vectors = narrow.reshape(-1, self.heads, self.code_dim)
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return vectors if real is None else torch.where(real[:, None, None], vectors, 0)

    def _codes(self, digits: Tensor) -> Tensor:
        return (digits * self._places).sum(-1)

    def _counts(self, codes: Tensor, real: Tensor | None) -> Tensor:
        """How many vectors have each code, int64 [K]."""
        ones = torch.ones_like(codes) if real is None else real[:, None].expand(codes.shape).long()
        return ones.new_zeros(self.num_codes).scatter_add(0, codes.flatten(), ones.flatten())

    def _grid(self, codes: Tensor, shape: torch.Size) -> Tensor:
        """Codes [N, heads] of an input [..., heads * D]."""
        return codes.view(*shape[:-1]) if self.heads == 1 else codes.view(*shape[:-1], self.heads)
