"""What a quantiser's pass consists of: the input, the codebook as it was then, and what was found in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._check import require_codes, require_dense, require_floating, require_integer, require_tensor
from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models.quantizer.codebook import Codebook
from fastvq.models.repeated_pass import Pass
from fastvq.ops.nearest_code import CodeStatistics


class Vectors(NamedTuple):
    """Checked input, as N times ``heads`` vectors, and in G groups of M that share a codebook.

    Attributes:
        shape, dtype: of the input.
        given: [N, heads, D].
        searched: [G, M, D], scaled to unit length for the cosine, where nearest by angle is nearest.
        real: bool [N], False where there is no vector; None where there are all.
        mask: the same as [G, M].
    """

    shape: torch.Size
    dtype: torch.dtype
    given: Tensor
    searched: Tensor
    real: Tensor | None
    mask: Tensor | None


class OpenPass(NamedTuple):
    """A pass that has begun, perhaps over several assignments.

    Attributes:
        given: its input, by which its repetition is known.
        codebook: where it looks codes up, and what it may move.
        codes: [G, K, D], of the codebook, neither changed by its updates nor differentiable.
        moves: whether the codebook moves by what the pass finds.
        first: the first run, if this is a repetition.
    """

    given: Tensor
    codebook: Codebook
    codes: Tensor
    moves: bool
    first: Pass | None


class Assignment(NamedTuple):
    """What was found for vectors, before the codebook moves.

    Attributes:
        vectors: what was looked for.
        quantized: [N, heads, D], 0 where masked; its gradient goes to the vectors.
        codes: int64 [N, heads], -1 where masked.
        statistics: counts [G, K] and sums [G, K, D], by which the codebook moves, and errors.
        commitment_error: ``mean |x - sg[e]|^2``, a scalar.
        codebook_error: ``mean |sg[x] - e|^2``, a scalar; 0 unless the codebook is learnable.
    """

    vectors: Vectors
    quantized: Tensor
    codes: Tensor
    statistics: CodeStatistics
    commitment_error: Tensor
    codebook_error: Tensor


def require_vectors(x: Tensor, mask: Tensor | None, channels: int, axis: int) -> None:
    """x is of floating point with so many channels along an axis, 1 or -1, and the mask fits it."""
    require_floating("x", require_tensor("x", x))
    if x.ndim < 2 or x.shape[axis] != channels:
        raise ArgumentError(f"x: expected {channels} channels along axis {axis}, got shape {list(x.shape)}")
    if mask is not None:
        if require_tensor("mask", mask).dtype != torch.bool:
            raise ArgumentTypeError(f"mask: expected torch.bool, got {mask.dtype}")
        require_dense("mask", mask)
        expected = [*x.shape[:-1]] if axis == -1 else [x.shape[0], *x.shape[2:]]
        if list(mask.shape) != expected:
            raise ArgumentError(f"mask: expected shape {expected}, got {list(mask.shape)}")
        if mask.device != x.device:
            raise ArgumentError(f"mask: expected device {x.device} as for x, got {mask.device}")


def require_code_grid(codes: Tensor, heads: int, num_codes: int) -> tuple[Tensor, Tensor]:
    """Codes [...], or [..., heads] with several, as int64 with 0 in place of -1; and bool, where they are -1."""
    codes = require_integer("codes", codes)
    absent = codes == -1
    codes = require_codes("codes", codes.masked_fill(absent, 0), [None] * codes.ndim, num_codes)
    if heads > 1 and (codes.ndim < 2 or codes.shape[-1] != heads):
        raise ArgumentError(f"codes: expected a last axis of {heads} heads, got shape {list(codes.shape)}")
    return codes, absent
