"""Quantisers between two linear maps, which find codes in fewer channels than their input has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._check import require_positive_int


class Projected(nn.Module):
    """A quantiser of vectors that are the input, or a linear map of it, whose codes' vectors are mapped back.

    Attributes:
        project_in, project_out: linear maps from and to the input's channels; None where the input itself is quantised.
    """

    project_in: nn.Linear | None
    project_out: nn.Linear | None

    def _make_projections(self, input_dim: int | None, width: int) -> None:
        """From input of so many channels to vectors of ``width`` channels and back; None: there are none."""
        self.project_in = self.project_out = None
        if input_dim is not None:
            require_positive_int("input_dim", input_dim)
            self.project_in, self.project_out = nn.Linear(input_dim, width), nn.Linear(width, input_dim)

    def _channels(self, width: int) -> int:
        """Channels of the input, where vectors have ``width``."""
        return width if self.project_in is None else self.project_in.in_features

    def _narrowed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Input [..., channels] as vectors [..., width]; nothing is seen of what lies where ``mask`` [...] is False."""
        if self.project_in is None:
            return x
        if mask is not None:
            # NaN in the padding would come back as a NaN gradient of the weights.
            x = torch.where(mask[..., None], x, 0)
        return _mapped(self.project_in, x)

    def _widened(self, vectors: Tensor, present: Tensor | None) -> Tensor:
        """Codes' vectors [..., width] as output [..., channels], 0 where ``present`` [...] is False."""
        if self.project_out is None:
            return vectors
        wide = _mapped(self.project_out, vectors)
        return wide if present is None else torch.where(present[..., None], wide, 0)

    def _looked_up(self, vectors: Tensor, absent: Tensor, *, heads: int, channels_last: bool) -> Tensor:
        """Vectors of codes, [..., heads, width] with several heads, as output; 0 where codes are ``absent``."""
        vectors = vectors.masked_fill(absent[..., None], 0)
        if heads > 1:
            vectors, absent = vectors.flatten(-2), absent.all(-1)
        vectors = self._widened(vectors, ~absent)
        return vectors if channels_last else vectors.movedim(-1, 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Whole modules pickled by earlier versions have none.
        for name in ("project_in", "project_out"):
            if name not in self._modules:
                self.__dict__.setdefault(name, None)


def _mapped(linear: nn.Linear, x: Tensor) -> Tensor:
    """In the type of the weights, or of autocast."""
    return F.linear(x.to(linear.weight.dtype), linear.weight, linear.bias)
